"""May this engine be promoted? Its embeddings of held-out rows against the float32 reference.

Knows nothing of how the engine was built or of what a promotion is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

import numpy as np

from engine.accuracy import (
    HISTOGRAM_BINS,
    Agreement,
    Embeddings,
    Recall,
    Thresholds,
    agreement,
    pair_recalls,
    row_cosines,
    top1_accuracy,
)
from engine.backends.encoder import Encoder
from engine.progress import OnProgress
from engine.sample import Sample
from engine.speeds import Speed, tower_inputs, tower_speeds

# Of zero-shot classification, as in Radford et al. 2021 (arXiv 2103.00020), section 3.1.4.
PROMPT = "a photo of a {}."
RECALL_CUTOFF = 10
ROWS_PER_STEP = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How the cosines of one modality are spread."""

    edges: tuple[float, ...]
    """Of the bins, ascending; the last is 1."""
    counts: tuple[int, ...]
    """Rows of each bin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Top1:
    """Zero-shot accuracy over the rows that have a label."""

    num_classes: int
    """Distinct labels."""
    reference: float
    """Share of images given their own label by the reference."""
    measured: float
    """By the engine."""


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """What the gate saw."""

    engine_id: str
    """The engine."""
    checkpoint: str
    """What it was built from."""
    backend: str
    """What executed it."""
    device: str
    """Where."""
    created_at: str
    """UTC, ISO 8601."""
    sample_uri: str
    """Catalog of the held-out rows."""
    sample_digest: str
    """SHA-256 of them."""
    thresholds: Thresholds
    """What was asked for."""
    agreements: dict[str, Agreement]
    """By modality."""
    query_agreements: dict[str, Agreement] = field(default_factory=dict)
    """The same by the plan for queries, where the backend has one of its own."""
    histograms: dict[str, Histogram]
    """Of cosines, by modality."""
    recalls: tuple[Recall, ...]
    """Where rows have an image and a text."""
    top1: Top1 | None
    """Where rows have labels."""
    speeds: tuple[Speed, ...]
    """On a GPU, beside 16 bit."""
    memory_bytes: dict[str, int]
    """Of the device, by encoder."""
    faults: tuple[str, ...]
    """Why the engine may not be promoted."""
    passed: bool = field(init=False)
    """Whether it may: there are no faults."""

    def __post_init__(self) -> None:
        """Derive the verdict."""
        object.__setattr__(self, "passed", not self.faults)


def run_gate(
    encoder: Encoder,
    reference: Encoder,
    sample: Sample,
    *,
    thresholds: Thresholds,
    backend: str,
    device: str,
    baselines: Mapping[str, Encoder],
    batch_sizes: Sequence[int],
    on_progress: OnProgress,
    query_encoder: Encoder | None = None,
    query_baselines: Mapping[str, Encoder] = MappingProxyType({}),
) -> GateReport:
    """Embed held-out rows by both and compare.

    Args:
        encoder: The engine, loaded by the backend that is to run it.
        reference: The same checkpoint in float32.
        sample: Rows that the engine was not calibrated with.
        thresholds: How close it must be.
        backend: Its name, for the report.
        device: What it runs on, for the report.
        baselines: Other encoders of the same checkpoint to time beside it, by name.
        batch_sizes: To time at; none to time nothing.
        on_progress: Called with a stage's name, and how many of how many rows are done.
        query_encoder: The engine by its plan for queries, None where one serves all: judged too,
            and timed in the encoder's place at batches of queries.
        query_baselines: The baselines by theirs, under the same names.
    """
    manifest = encoder.manifest
    ours = _embeddings(encoder, sample, stage="engine", on_progress=on_progress)
    theirs = _embeddings(reference, sample, stage="reference", on_progress=on_progress)
    agreements = {name: agreement(ours[name], theirs[name]) for name in ours}
    query_agreements = {}
    if query_encoder is not None:
        by_query = _embeddings(
            query_encoder, sample, stage="engine for queries", on_progress=on_progress
        )
        query_agreements = {name: agreement(by_query[name], theirs[name]) for name in by_query}
    recalls: list[Recall] = []
    if len(ours) == 2:
        recalls = pair_recalls(
            images=ours["image"],
            texts=ours["text"],
            reference=(theirs["image"], theirs["text"]),
        )
    top1 = None
    if sample.labels is not None and "text" in manifest.modalities and "image" in ours:
        top1 = _top1(encoder, reference, sample.labels, ours["image"], theirs["image"])
    ours_name = f"{manifest.precision} {backend}"
    named = {ours_name: encoder, **baselines}
    for_queries = dict(query_baselines)
    if query_encoder is not None:
        for_queries[ours_name] = query_encoder
    num_labelled = sum(label is not None for label in sample.labels or ())
    faults = _faults(
        thresholds, manifest.modalities, agreements, recalls, top1, num_labelled=num_labelled
    )
    faults += [
        f"{name} by the plan for queries: {fault}"
        for name, measured in query_agreements.items()
        for fault in thresholds.faults(measured)
    ]
    return GateReport(
        engine_id=manifest.engine_id,
        checkpoint=manifest.checkpoint,
        backend=backend,
        device=device,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        sample_uri=sample.uri,
        sample_digest=sample.digest,
        thresholds=thresholds,
        agreements=agreements,
        query_agreements=query_agreements,
        histograms={name: _histogram(ours[name], theirs[name]) for name in ours},
        recalls=tuple(recalls),
        top1=top1,
        speeds=tuple(
            speed
            for name, timed in named.items()
            for speed in tower_speeds(
                sample,
                name=name,
                encoder=timed,
                query_encoder=for_queries.get(name, timed),
                batch_sizes=batch_sizes,
            )
        ),
        memory_bytes={
            name: loaded.device_memory_bytes
            for name, loaded in (
                *named.items(),
                *((f"{name}, for queries", loaded) for name, loaded in for_queries.items()),
            )
            if loaded.device_memory_bytes
        },
        faults=tuple(faults),
    )


def _embeddings(
    encoder: Encoder,
    sample: Sample,
    *,
    stage: str,
    on_progress: OnProgress,
) -> dict[str, Embeddings]:
    embeddings = {}
    for name, (encode, rows) in tower_inputs(encoder, sample=sample).items():
        places = np.arange(len(rows))
        if name == "text":
            # Once each: beside others, a text may come out a little otherwise than its copies.
            rows, places = np.unique(rows, return_inverse=True)
        parts = []
        for first in range(0, len(rows), ROWS_PER_STEP):
            on_progress(f"{stage}: {name}", first, len(rows))
            parts.append(encode(rows[first : first + ROWS_PER_STEP]))
        on_progress(f"{stage}: {name}", len(rows), len(rows))
        embeddings[name] = np.concatenate(parts)[places]
    return embeddings


def _histogram(ours: Embeddings, theirs: Embeddings) -> Histogram:
    cosines = np.nan_to_num(row_cosines(ours, theirs), nan=0.0)
    counts, edges = np.histogram(
        np.minimum(cosines, 1.0), bins=HISTOGRAM_BINS, range=(float(min(cosines.min(), 0.99)), 1.0)
    )
    return Histogram(edges=tuple(map(float, edges)), counts=tuple(map(int, counts)))


def _top1(
    encoder: Encoder,
    reference: Encoder,
    labels: Sequence[str | None],
    ours: Embeddings,
    theirs: Embeddings,
) -> Top1 | None:
    """Over the rows that have a label; None if no row has one."""
    labelled = [row for row, label in enumerate(labels) if label is not None]
    classes = sorted({label for label in labels if label is not None})
    if not classes:
        return None
    numbers = [classes.index(label) for label in labels if label is not None]
    ours, theirs = ours[labelled], theirs[labelled]
    prompts = [PROMPT.format(name) for name in classes]
    return Top1(
        num_classes=len(classes),
        reference=top1_accuracy(theirs, classes=reference.encode_texts(prompts), labels=numbers),
        measured=top1_accuracy(ours, classes=encoder.encode_texts(prompts), labels=numbers),
    )


def _faults(
    thresholds: Thresholds,
    modalities: Sequence[str],
    agreements: Mapping[str, Agreement],
    recalls: Sequence[Recall],
    top1: Top1 | None,
    *,
    num_labelled: int,
) -> list[str]:
    faults = [
        f"{name}: not judged, since the sample has none"
        for name in modalities
        if name not in agreements
    ]
    faults += [
        f"{name}: {fault}"
        for name, measured in agreements.items()
        for fault in thresholds.faults(measured)
    ]
    for recall in recalls:
        lost = _lost(recall.reference[RECALL_CUTOFF], recall.measured[RECALL_CUTOFF])
        allowed = _allowed(thresholds.max_recall_loss, num_rows=agreements["image"].num_rows)
        if lost > allowed:
            faults.append(
                f"{recall.direction} recall@{RECALL_CUTOFF} loses {lost:.4f}, more than {allowed:g}"
            )
    if top1 is not None:
        lost = _lost(top1.reference, top1.measured)
        allowed = _allowed(thresholds.max_top1_loss, num_rows=num_labelled)
        if lost > allowed:
            faults.append(f"zero-shot top-1 loses {lost:.4f}, more than {allowed:g}")
    return faults


def _allowed(max_loss: float, *, num_rows: int) -> float:
    """Where the threshold is less than one of few rows, but not 0, that one may be lost."""
    return round(max(max_loss, 1 / num_rows), 9) if max_loss else 0.0


def _lost(reference: float, measured: float) -> float:
    return round(reference - measured, 9)  # 1 - 0.99 is a little more than 0.01 in floats
