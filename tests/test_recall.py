"""Tests of pipelines/indexes/recall.py: against an index whose answers are given."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipelines.indexes import recall
from pipelines.indexes.manifest import MeasuredRecall
from pipelines.indexes.opening import OpenIndex
from pipelines.indexes.truth import Truth

NUM_ROWS, DIM = 300, 16


def vectors_of(num_rows: int, *, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


ROWS = vectors_of(NUM_ROWS, seed=1)


class Known:
    """An index that leaves out of its answers those whose place is no multiple of a number."""

    def __init__(self, *, kind: str = "ivf", num_lists: int = 16, least_good: int = 4) -> None:
        self.manifest = SimpleNamespace(kind=kind)
        self.trained = SimpleNamespace(nlist=num_lists)
        self.setting, self.asked = 7, cast("list[tuple[int, int]]", [])
        self._least_good = least_good

    def search(self, vectors: np.ndarray, *, num_hits: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((self.setting, num_hits))
        cosines = vectors @ ROWS.T
        order = np.argsort(-cosines, axis=1)
        if self.setting < self._least_good:
            order = order[:, ::2]  # half of what is near
        ids = order[:, :num_hits]
        return np.take_along_axis(cosines, ids, axis=1), ids


def asked(*, own: bool) -> Truth:
    ids = np.arange(20) if own else np.full(20, -1)
    vectors = ROWS[:20] if own else vectors_of(20, seed=2)
    truth = Truth.unanswered([("image", vectors, ids)], embedding_dim=DIM)
    return truth.with_rows(ROWS, np.arange(NUM_ROWS))


def index_of(known: Known) -> OpenIndex:
    return cast("OpenIndex", cast("Any", known))


@pytest.mark.parametrize("own", [False, True])
def test_recall_is_the_share_of_the_nearest_that_are_found(own):
    known = Known()
    (good,) = recall.measure_setting(index_of(known), asked(own=own), setting=4)
    assert good.recall == {"1": 1.0, "10": 1.0, "100": 1.0}
    assert (good.kind, good.setting, good.num_queries) == ("image", 4, 20)
    assert good.search_seconds > 0
    (bad,) = recall.measure_setting(index_of(known), asked(own=own), setting=3)
    # Every other of the nearest; a row that is asked for itself is the first of them.
    assert bad.recall["10"] == pytest.approx(0.5, abs=0.01)
    assert known.setting == 7
    assert {num_hits for _, num_hits in known.asked} == {1 + own, 10 + own, 100 + own, 10}


def test_rows_as_near_as_the_last_count_too():
    copies = np.repeat(ROWS[:1], 300, axis=0)
    truth = Truth.unanswered([("image", ROWS[:1], np.array([-1]))], embedding_dim=DIM)
    truth = truth.with_rows(copies, np.arange(300))

    class OfOthers(Known):
        def search(self, vectors: np.ndarray, *, num_hits: int):
            return np.ones((1, num_hits)), np.arange(299, 299 - num_hits, -1)[None]

    (found,) = recall.measure_setting(index_of(OfOthers()), truth, setting=1)
    assert found.recall == {"1": 1.0, "10": 1.0, "100": 1.0}


def test_the_curve_ends_a_little_beyond_what_suffices():
    known = Known(num_lists=64, least_good=12)
    measured = recall.measure_curve(index_of(known), asked(own=False), min_recall=0.9)
    # In steps of two while there is much to gain; with all found there is nothing left to try.
    assert [entry.setting for entry in measured] == [1, 2, 4, 8, 16]
    assert recall.chosen_setting(measured, min_recall=0.9) == 16
    assert recall.chosen_setting(measured[:4], min_recall=0.9) == 1


@pytest.mark.parametrize("setting", [12, 48, 64, 100])
def test_an_update_is_measured_at_the_setting_before(setting):
    known = Known(num_lists=100, least_good=2)
    measured = recall.measure_curve(
        index_of(known), asked(own=False), min_recall=0.9, least_setting=setting, max_beyond=0
    )
    assert [entry.setting for entry in measured] == [setting]


def test_what_is_slow_is_tried_until_it_suffices(monkeypatch):
    monkeypatch.setattr(recall, "_search_seconds", lambda *_: 0.1)
    measured = recall.measure_curve(
        index_of(Known(num_lists=64, least_good=8)), asked(own=False), min_recall=0.9
    )
    assert [entry.setting for entry in measured] == [1, 2, 4, 8]


def test_an_exact_index_is_measured_once_and_a_graph_by_its_queue():
    exact = recall.measure_curve(
        index_of(Known(kind="exact", least_good=0)), asked(own=False), min_recall=0.9
    )
    assert [entry.setting for entry in exact] == [0]
    graph = recall.settings_of(index_of(Known(kind="hnsw")))
    assert (graph[0], graph[-1]) == (16, 2048)


def test_the_least_setting_is_chosen_that_suffices_for_all_kinds():
    def entry(kind: str, setting: int, found: float) -> MeasuredRecall:
        return MeasuredRecall(
            kind=kind, setting=setting, num_queries=1, recall={"10": found}, search_seconds=0.0
        )

    measured = [
        *(entry("image", 1, 0.99), entry("text", 1, 0.5)),
        *(entry("image", 2, 0.99), entry("text", 2, 0.96)),
        *(entry("image", 4, 1.0), entry("text", 4, 0.99)),
    ]
    assert recall.chosen_setting(measured, min_recall=0.95) == 2
    assert recall.chosen_setting(measured, min_recall=0.999) == 4
    assert recall.chosen_setting([], min_recall=0.95) == 0
