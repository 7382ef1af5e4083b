"""Measures what an index finds of what an exact search finds, and chooses how hard to search.

Knows nothing of how the index was built.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import numpy as np
from numpy.typing import NDArray

from engine.accuracy import TIE
from pipelines.indexes.manifest import MeasuredRecall
from pipelines.indexes.opening import OpenIndex
from pipelines.indexes.truth import DEPTH, Truth

KS = (1, 10, 100)
CHOSEN_K = 10
# Queries of each kind that are timed, one at a time.
NUM_TIMED = 64
# With fewer, all are asked for a hundred answers.
MIN_QUERIES = 50
# No more settings are tried where there is nothing left to gain, or nobody would wait.
ENOUGH_RECALL = 0.998
MAX_SEARCH_SECONDS = 0.05
# Slower ones are not tried, be the recall what it may; on a cold disk a search is that slow.
MAX_TRIED_SECONDS = 2.0
# Of the cosine that an index of 8-bit codes gives.
CODE_TOLERANCE = 5e-3
# Below this recall only every other setting is tried.
COARSE_RECALL = 0.8
# Settings tried beyond the one that is chosen, for the curve.
NUM_BEYOND = 2

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


def settings_of(index: OpenIndex) -> list[int]:
    """Settings to try, ascending."""
    manifest = index.manifest
    if manifest.kind == "exact":
        return [0]
    steps = [step * 2**power for power in range(18) for step in (2, 3)]
    if manifest.kind == "hnsw":
        return [setting for setting in steps if 16 <= setting <= 2048]
    num_lists = int(index.trained.nlist)
    return [1, *(setting for setting in steps if setting < num_lists), num_lists]


def measure_curve(
    index: OpenIndex,
    truth: Truth,
    *,
    min_recall: float,
    least_setting: int = 0,
    max_beyond: int = NUM_BEYOND,
) -> list[MeasuredRecall]:
    """Measure all settings that are of interest: up to a few beyond the one that suffices.

    Args:
        index: Whose setting is left as it was.
        truth: Queries and their exact answers.
        min_recall: recall@10 that is asked for, of each kind of queries.
        least_setting: Lower ones are not tried.
        max_beyond: Settings tried after the first that suffices.
    """
    found: list[MeasuredRecall] = []
    # An update begins where the index before it was good.
    num_beyond, worst = 0, 1.0 if least_setting else 0.0
    for setting in settings_of(index):
        is_power = not setting & (setting - 1)
        if setting < least_setting or (worst < COARSE_RECALL and not is_power):
            continue
        at_setting = measure_setting(index, truth, setting=setting)
        found += at_setting
        if not at_setting:
            break
        worst = min(entry.recall[str(CHOSEN_K)] for entry in at_setting)
        num_beyond += worst >= min_recall
        slowest = max(entry.search_seconds for entry in at_setting)
        if worst >= ENOUGH_RECALL or num_beyond > max_beyond:
            break
        if slowest > (MAX_SEARCH_SECONDS if worst >= min_recall else MAX_TRIED_SECONDS):
            break
    return found


def measure_setting(index: OpenIndex, truth: Truth, *, setting: int) -> list[MeasuredRecall]:
    """Measure each kind of queries at one setting."""
    measured = []
    for number, kind in enumerate(truth.kinds):
        asked = np.flatnonzero((truth.kind_of == number) & (truth.ids[:, 0] >= 0))
        if not len(asked):
            continue
        with _searching(index, setting=setting):
            recalls = _recalls(index, truth, asked)
            seconds = _search_seconds(index, truth.vectors[asked[:NUM_TIMED]])
        measured.append(
            MeasuredRecall(
                kind=kind,
                setting=setting,
                num_queries=len(asked),
                recall=recalls,
                search_seconds=seconds,
            )
        )
    return measured


def chosen_setting(measured: list[MeasuredRecall], *, min_recall: float) -> int:
    """The least setting at which each kind of queries has the recall; else that with the most."""
    worst: dict[int, float] = {}
    for entry in measured:
        recall = entry.recall[str(CHOSEN_K)]
        worst[entry.setting] = min(recall, worst.get(entry.setting, 1.0))
    for setting in sorted(worst):
        if worst[setting] >= min_recall:
            return setting
    return max(worst, key=lambda setting: (worst[setting], -setting), default=0)


def _recalls(index: OpenIndex, truth: Truth, asked: Ids) -> dict[str, float]:
    """K -> mean share of the exact k nearest that are found; those as near as the last count too.

    As few are asked for as users would ask for: of more an index may look at more.
    """
    # One more where a row is asked for itself, which is no answer.
    num_own = int((truth.own_ids[asked] >= 0).any())
    recalls: dict[str, float] = {}
    for k in KS:
        part = asked[:: _step(len(asked)) if k > CHOSEN_K else 1]
        scores, ids = index.search(truth.vectors[part], num_hits=k + num_own)
        scores, ids = _without_own(scores, ids, truth.own_ids[part])
        recalls[str(k)] = _recall(scores[:, :k], ids[:, :k], truth, part)
    return recalls


def _step(num_queries: int) -> int:
    """Of how many queries one is asked for a hundred answers, which take longest."""
    return max(1, min(10, num_queries // MIN_QUERIES))


def _recall(scores: Vectors, ids: Ids, truth: Truth, asked: Ids) -> float:
    exact_ids, exact_scores = truth.ids[asked], truth.scores[asked]
    num_exact = np.minimum((exact_ids >= 0).sum(axis=1), ids.shape[1])
    last = exact_scores[np.arange(len(asked)), num_exact - 1] - TIE
    shares = []
    for row, found in enumerate(ids):
        near = exact_ids[row][(exact_scores[row] >= last[row]) & (exact_ids[row] >= 0)]
        is_near = (found >= 0) & np.isin(found, near)
        if len(near) == DEPTH:  # more are as near than are known: copies of one row
            is_near |= scores[row] >= last[row] - CODE_TOLERANCE
        shares.append(min(int(is_near.sum()), num_exact[row]) / num_exact[row])
    return float(np.mean(shares))


def _without_own(scores: Vectors, ids: Ids, own_ids: Ids) -> tuple[Vectors, Ids]:
    """Answers [N, K] without each query's own row: the others move up."""
    is_own = (ids == own_ids[:, None]) & (ids >= 0)
    order = np.argsort(is_own, axis=1, kind="stable")
    ids, scores = np.where(is_own, -1, ids), np.where(is_own, -np.inf, scores)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _search_seconds(index: OpenIndex, vectors: NDArray[np.float32]) -> float:
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        seconds = []
        for row in range(len(vectors)):
            started = time.perf_counter()
            index.search(vectors[row : row + 1], num_hits=CHOSEN_K)
            seconds.append(time.perf_counter() - started)
    finally:
        faiss.omp_set_num_threads(num_threads)
    return float(np.median(seconds))


@contextmanager
def _searching(index: OpenIndex, *, setting: int) -> Iterator[None]:
    before, index.setting = index.setting, setting
    try:
        yield
    finally:
        index.setting = before
