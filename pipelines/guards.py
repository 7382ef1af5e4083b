"""Guards of a store: is what a run would commit fit to take the place of what is there?

Knows nothing of how it was embedded, or of what is done about a guard that trips.

Keys are compared exactly, which reads keys and fingerprints of the files that only one of two
snapshots lists. Vectors are judged by samples of at most 4,096 rows of at most 16 files
(`stored_samples`): a store of a billion rows costs no more than one of a million.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.accuracy import NEIGHBOURS, TIE, neighbour_overlap
from pipelines.changes import find_changes
from pipelines.errors import GuardError
from pipelines.indexing import load_index, search_among
from pipelines.lineage import Measurement
from pipelines.parent import is_other_engine
from pipelines.snapshots import Snapshot
from pipelines.store import Store
from pipelines.stored_samples import draw_pairs, draw_sample

# Fewer deletions or rejects than this trip nothing: a share of a handful of rows says nothing.
MIN_ROWS_TO_TRIP = 20
# Of a norm from 1; float16 elements round it by less than 1e-3.
NORM_TOLERANCE = 1e-2
# Of embeddings that spread widely, the means of a few hundred differ by chance alone.
MIN_ROWS_OF_MEAN = 1000
# Rows that the index is asked for.
NUM_QUERIES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardLimits:
    """How far a snapshot may be from the one before it."""

    max_rejects: float = 0.1
    """Share of the keys that are rejects, of a modality; as `RowLimits.max_reject_share`."""
    max_deletions: float = 0.2
    """Share of the keys before that are gone: catalogs lose few in a night, half-delivered ones
    many."""
    max_norms: float = 0.0
    """Share of new embeddings whose norm is not 1: the towers' last step is that norm."""
    min_drift: float = 0.9
    """Cosine of the mean embedding to that before, by the same engine. Of the same rows but some it
    is nearly 1; black images, or one language in place of another, move the mean of all."""
    min_neighbours: float = 0.5
    """Of ten neighbours, after a change of engine: builds of one checkpoint keep 0.9 and more (the
    gate of engines asks 0.93); who loses half sees the catalog otherwise, and means to."""
    min_recall: float = 0.95
    """recall@10 of the index; of an exact one it is 1."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = -1 if field.name == "min_drift" else 0
            if not lowest <= value <= 1:
                raise ValueError(f"{field.name}={value}: expected {lowest} to 1")


def measure(
    store: Store, candidate: Snapshot, parent: Snapshot | None, *, limits: GuardLimits
) -> list[Measurement]:
    """Measure all that can be without an index.

    Args:
        store: Where their files are.
        candidate: What would be committed.
        parent: The snapshot before it; None if there is none: then nothing is compared.
        limits: The bounds.

    Raises:
        StoreError: The store cannot be read.
    """
    found = [*_rejects(candidate, limits=limits)]
    if parent is not None:
        found += _deletions(store, candidate, parent, limits=limits)
    found += _norms(store, candidate, parent, limits=limits)
    if parent is not None:
        compare = _neighbours if is_other_engine(candidate.engine, parent) else _drift
        found += compare(store, candidate, parent, limits=limits)
    return found


def measure_index(store: Store, snapshot: Snapshot, *, limits: GuardLimits) -> list[Measurement]:
    """Measure the recall of a snapshot's indexes.

    Of at most 4,096 sampled rows, 256 are asked for. The exact answer is the nearest ten among the
    sampled; the index must give those when it may answer with no others.

    Raises:
        IndexMissingError: One is not built.
        StoreError: The store cannot be read.
    """
    return list(_recalls(store, snapshot, limits=limits))


def check(measurements: Sequence[Measurement], *, accepted: Collection[str], outcome: str) -> None:
    """Raise GuardError that names all guards that tripped and are not accepted.

    Args:
        measurements: Of all guards.
        accepted: Names of guards that may trip.
        outcome: What becomes of the store, a sentence.
    """
    tripped = [
        measurement
        for measurement in measurements
        if measurement.is_tripped and measurement.guard not in accepted
    ]
    if tripped:
        lines = "".join(f"\n  - {measurement_line(measurement)}" for measurement in tripped)
        names = dict.fromkeys(measurement.guard for measurement in tripped)
        options = " ".join(f"--accept {name}" for name in names)
        raise GuardError(
            f"guards tripped:{lines}\n{outcome} If this is as it should be, run the same command "
            f"with {options}; otherwise mend the cause and run it again"
        )


def measurement_line(measurement: Measurement) -> str:
    """One measurement in one line."""
    what = (
        measurement.guard
        if measurement.modality is None
        else (f"{measurement.guard} of {measurement.modality}")
    )
    side = "most" if measurement.guard in ("rejects", "deletions", "norms") else "least"
    return (
        f"{what}: {measurement.value:.4f}, at {side} {measurement.bound:g} is allowed "
        f"({measurement.detail})"
    )


def _rejects(candidate: Snapshot, *, limits: GuardLimits) -> Iterator[Measurement]:
    for modality in candidate.modalities:
        num_rejects = candidate.num_rows("rejects", modality=modality)
        num_keys = candidate.catalog.num_keys
        share = num_rejects / max(num_keys, 1)
        yield Measurement(
            guard="rejects",
            modality=modality,
            value=share,
            bound=limits.max_rejects,
            is_tripped=share > limits.max_rejects and num_rejects >= MIN_ROWS_TO_TRIP,
            detail=f"{num_rejects:,} of {num_keys:,} keys",
        )


def _deletions(
    store: Store, candidate: Snapshot, parent: Snapshot, *, limits: GuardLimits
) -> Iterator[Measurement]:
    changes = find_changes(store, parent, candidate)
    # Every key is in every modality, as an embedding or a reject.
    num_gone = max(found.removed for found in changes.values())
    num_keys = parent.catalog.num_keys
    share = num_gone / max(num_keys, 1)
    is_emptied = num_keys > 0 and candidate.catalog.num_keys == 0
    yield Measurement(
        guard="deletions",
        modality=None,
        value=share,
        bound=limits.max_deletions,
        is_tripped=share > limits.max_deletions and (num_gone >= MIN_ROWS_TO_TRIP or is_emptied),
        detail=f"{num_gone:,} of {num_keys:,} keys of snapshot {parent.number} are gone"
        + (", the catalog is empty" if is_emptied else ""),
    )


def _norms(
    store: Store, candidate: Snapshot, parent: Snapshot | None, *, limits: GuardLimits
) -> Iterator[Measurement]:
    before = frozenset(() if parent is None else parent.files)
    for modality in candidate.modalities:
        files = candidate.files_of("embeddings", modality=modality)
        sample = draw_sample(store, [file for file in files if file not in before])
        if sample is None:
            continue
        norms = np.linalg.norm(sample.vectors, axis=1)
        is_off = ~(np.abs(norms - 1) <= NORM_TOLERANCE)  # of NaN too
        share = float(is_off.mean())
        yield Measurement(
            guard="norms",
            modality=modality,
            value=share,
            bound=limits.max_norms,
            is_tripped=share > limits.max_norms,
            detail=f"{is_off.sum():,} of {len(norms):,} new embeddings",
        )


def _drift(
    store: Store, candidate: Snapshot, parent: Snapshot, *, limits: GuardLimits
) -> Iterator[Measurement]:
    for modality in candidate.modalities:
        now, before = (
            draw_sample(store, snapshot.files_of("embeddings", modality=modality))
            for snapshot in (candidate, parent)
        )
        if now is None or before is None:
            continue
        if min(len(now.vectors), len(before.vectors)) < MIN_ROWS_OF_MEAN:
            continue
        cosine = _mean_cosine(now.vectors, before.vectors)
        yield Measurement(
            guard="drift",
            modality=modality,
            value=cosine,
            bound=limits.min_drift,
            is_tripped=cosine < limits.min_drift,
            detail=f"means of {len(now.vectors):,} and {len(before.vectors):,} embeddings",
        )


def _neighbours(
    store: Store, candidate: Snapshot, parent: Snapshot, *, limits: GuardLimits
) -> Iterator[Measurement]:
    for modality in candidate.modalities:
        pairs = draw_pairs(
            store,
            parent.files_of("embeddings", modality=modality),
            candidate.files_of("embeddings", modality=modality),
        )
        if pairs is None:
            continue
        before, now = pairs
        overlap = neighbour_overlap(now, before)
        yield Measurement(
            guard="neighbours",
            modality=modality,
            value=overlap,
            bound=limits.min_neighbours,
            is_tripped=overlap < limits.min_neighbours,
            detail=f"{NEIGHBOURS} neighbours of {len(now):,} keys, by engine "
            f"{candidate.engine.engine_id} and by {parent.engine.engine_id}",
        )


def _recalls(store: Store, snapshot: Snapshot, *, limits: GuardLimits) -> Iterator[Measurement]:
    for modality in snapshot.modalities:
        sample = draw_sample(store, snapshot.files_of("embeddings", modality=modality))
        if sample is None:
            continue
        index, keys = load_index(store, snapshot, modality=modality)
        ids = pc.index_in(sample.keys, value_set=keys).fill_null(-1).to_numpy().astype(np.int64)
        queries = sample.vectors[:: -(-len(ids) // NUM_QUERIES)]
        num_hits = min(NEIGHBOURS, len(ids))
        scores = queries @ sample.vectors.T
        last = np.partition(scores, -num_hits, axis=1)[:, -num_hits]
        answers = search_among(index, queries, ids=ids[ids >= 0], num_hits=num_hits)
        places = {int(id_): place for place, id_ in enumerate(ids)}
        shared = [
            scores[query, places[hit]] >= last[query] - TIE
            for query, hits in enumerate(answers.tolist())
            for hit in hits
            if hit >= 0
        ]
        recall = float(np.sum(shared)) / answers.size
        yield Measurement(
            guard="recall",
            modality=modality,
            value=recall,
            bound=limits.min_recall,
            is_tripped=recall < limits.min_recall,
            detail=f"{num_hits} nearest of {len(queries):,} among {len(ids):,} embeddings",
        )


def _mean_cosine(now: NDArray[np.float32], before: NDArray[np.float32]) -> float:
    means = [vectors.mean(axis=0, dtype=np.float64) for vectors in (now, before)]
    norms = [np.linalg.norm(mean) for mean in means]
    cosine = float(means[0] @ means[1] / max(norms[0] * norms[1], np.finfo(float).tiny))
    return cosine if np.isfinite(cosine) else -1.0
