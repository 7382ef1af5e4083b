"""Guards of a store: is what a run would commit fit to take the place of what is there?

Knows nothing of how it was embedded, or of what is done about a guard that trips.

Keys are compared exactly, which reads keys and fingerprints of the files that only one of two
snapshots lists. Vectors are judged by samples of at most 4,096 rows of at most 16 files
(`stored_samples`): a store of a billion rows costs no more than one of a million.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow.compute as pc

from engine.accuracy import NEIGHBOURS, TIE
from pipelines.candidate import Candidate
from pipelines.changes import find_changes
from pipelines.errors import GuardError
from pipelines.guard_limits import GuardLimits
from pipelines.indexing import load_index, search_among
from pipelines.lineage import Measurement, measurement_line
from pipelines.snapshots import Snapshot
from pipelines.store import Store
from pipelines.stored_samples import draw_sample
from pipelines.vector_guards import measure_vectors

# Fewer deletions or rejects than this trip nothing: a share of a handful of rows says nothing.
MIN_ROWS_TO_TRIP = 20
# Rows that the index is asked for.
NUM_QUERIES = 256


def measure(store: Store, candidate: Candidate, *, limits: GuardLimits) -> list[Measurement]:
    """Measure all that can be without an index.

    Args:
        store: Where the files are.
        candidate: What would be committed; where it has no parent, nothing is compared.
        limits: The bounds.

    Raises:
        StoreError: The store cannot be read.
    """
    snapshot, parent = candidate.snapshot, candidate.parent
    found = [*_rejects(snapshot, limits=limits)]
    if parent is not None:
        found += _deletions(store, snapshot, parent, limits=limits)
    return [*found, *measure_vectors(store, candidate, limits=limits)]


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


def _rejects(candidate: Snapshot, *, limits: GuardLimits) -> Iterator[Measurement]:
    yield from _whole_row_rejects(candidate, limits=limits)
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


def _whole_row_rejects(candidate: Snapshot, *, limits: GuardLimits) -> Iterator[Measurement]:
    num_rejects = sum(file.num_rows for file in candidate.files if file.modality is None)
    num_rows, num_keys = candidate.catalog.num_rows, candidate.catalog.num_keys
    if num_rejects:
        share = num_rejects / num_rows
        is_many = share > limits.max_rejects and num_rejects >= MIN_ROWS_TO_TRIP
        yield Measurement(
            guard="rejects",
            modality=None,
            value=share,
            bound=limits.max_rejects,
            is_tripped=is_many or num_keys == 0,
            detail=f"{num_rejects:,} of {num_rows:,} rows have null or duplicate keys"
            + ("" if num_keys else ", none has a key"),
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
