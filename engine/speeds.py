"""Times the towers of an encoder at batch sizes, over rows of a sample.

Knows nothing of what the speeds are compared with.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.accuracy import Embeddings
from engine.backends.encoder import Encoder
from engine.plans.plan import QUERY
from engine.sample import Sample

SPEED_REPEATS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """One tower at one batch size, transfers to and from the device included."""

    encoder: str
    """Which: `fp8 tensorrt`, for example."""
    modality: str
    """image or text."""
    batch_rows: int
    """Rows of one call."""
    rows_per_second: float
    """Median."""


def tower_inputs(
    encoder: Encoder, *, sample: Sample
) -> dict[str, tuple[Callable[[Any], Embeddings], Any]]:
    """Modality -> how it is encoded, and the rows."""
    inputs: dict[str, tuple[Callable[[Any], Embeddings], Any]] = {}
    if sample.pixels is not None:
        inputs["image"] = encoder.encode_images, sample.pixels
    if sample.texts is not None and "text" in encoder.manifest.modalities:
        inputs["text"] = encoder.encode_texts, np.array(sample.texts, dtype=object)
    return inputs


def tower_speeds(
    sample: Sample,
    *,
    name: str,
    encoder: Encoder,
    query_encoder: Encoder,
    batch_sizes: Sequence[int],
) -> list[Speed]:
    """Time each tower that there are rows for.

    Args:
        sample: Rows, given again and again where a batch is longer.
        name: Of the encoder, for the report.
        encoder: Timed at batches above those of queries.
        query_encoder: Timed at batches of queries.
        batch_sizes: To time at.
    """
    speeds = []
    for modality in tower_inputs(encoder, sample=sample):
        for batch_rows in batch_sizes:
            timed = query_encoder if batch_rows <= QUERY.max_rows else encoder
            encode, rows = tower_inputs(timed, sample=sample)[modality]
            batch = rows[np.arange(batch_rows) % len(rows)]
            encode(batch)  # the first call of a shape prepares what later ones use
            seconds = []
            for _ in range(SPEED_REPEATS):
                started = time.perf_counter()
                encode(batch)
                seconds.append(time.perf_counter() - started)
            speeds.append(
                Speed(
                    encoder=name,
                    modality=modality,
                    batch_rows=batch_rows,
                    rows_per_second=batch_rows / float(np.median(seconds)),
                )
            )
    return speeds
