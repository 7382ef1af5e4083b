"""Tests of engine/speeds.py, by a clock that only encoders move."""

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.plans.plan import QUERY
from engine.sample import Sample
from engine.speeds import SPEED_REPEATS, Speed, tower_inputs, tower_speeds

PREPARING_SECONDS = 100.0
PIXELS = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
BOTH = Sample(uri="catalog", pixels=PIXELS, texts=("a", "b", "c"))


class Timed:
    """The first call of a tower at a size takes long, later ones 1, 2, ... times `seconds`."""

    now = 0.0

    def __init__(self, *, seconds: float = 1.0, modalities: tuple[str, ...] = ("image", "text")):
        self.manifest = SimpleNamespace(modalities=modalities)
        self.batches: list[list[Any]] = []
        self._seconds = seconds
        self._num_calls: Counter[tuple[str, int]] = Counter()

    def encode_images(self, pixels: np.ndarray) -> None:
        self._encode("image", pixels[:, 0, 0, 0].tolist())

    def encode_texts(self, texts: np.ndarray) -> None:
        self._encode("text", texts.tolist())

    def _encode(self, modality: str, batch: list[Any]) -> None:
        self.batches.append(batch)
        place = self._num_calls[modality, len(batch)]
        Timed.now += place * self._seconds if place else PREPARING_SECONDS
        self._num_calls[modality, len(batch)] += 1


@pytest.fixture(autouse=True)
def _no_other_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: Timed.now)


def speeds(
    sample: Sample, *batch_sizes: int, encoder: Timed, query_encoder: Timed | None = None
) -> list[Speed]:
    return tower_speeds(
        sample,
        name="fp8 tensorrt",
        encoder=encoder,
        query_encoder=query_encoder or encoder,
        batch_sizes=batch_sizes,
    )


def test_a_speed_is_that_of_the_median_call_without_the_first():
    found = speeds(BOTH, 2, 40, encoder=Timed(seconds=0.5))
    # Calls of 0.5, 1, ... 3.5 s.
    assert found == [
        Speed(
            encoder="fp8 tensorrt",
            modality=modality,
            batch_rows=batch_rows,
            rows_per_second=batch_rows / 2.0,
        )
        for modality in ("image", "text")
        for batch_rows in (2, 40)
    ]


def test_batches_up_to_those_of_queries_are_timed_by_what_encodes_queries():
    bulk, query = Timed(seconds=1), Timed(seconds=2)
    few, many = QUERY.max_rows, QUERY.max_rows + 1
    found = speeds(BOTH, few, many, encoder=bulk, query_encoder=query)
    assert [speed.rows_per_second for speed in found] == [few / 8, many / 4] * 2
    for encoder, batch_rows in ((bulk, many), (query, few)):
        assert list(map(len, encoder.batches)) == [batch_rows] * 2 * (1 + SPEED_REPEATS)


def test_rows_come_again_where_a_batch_is_longer():
    encoder = Timed()
    speeds(BOTH, 2, 7, encoder=encoder)
    assert encoder.batches[0] == [0, 1]
    assert encoder.batches[-1] == ["a", "b", "c", "a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("sample", "modalities", "timed"),
    [
        (Sample(uri="catalog", pixels=PIXELS, texts=None), ("image", "text"), ["image"]),
        (Sample(uri="catalog", pixels=None, texts=("a",)), ("image", "text"), ["text"]),
        (BOTH, ("image",), ["image"]),
    ],
)
def test_towers_without_rows_and_rows_without_a_tower_are_left_out(
    sample: Sample, modalities: tuple[str, ...], timed: list[str]
):
    encoder = Timed(modalities=modalities)
    assert list(tower_inputs(encoder, sample=sample)) == timed
    assert [speed.modality for speed in speeds(sample, 1, encoder=encoder)] == timed
