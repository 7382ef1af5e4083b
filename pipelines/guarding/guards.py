"""Guards of a store: is what a run would commit fit to take the place of what is there?

Knows nothing of how it was embedded, or of what is done about a guard that trips.

Keys are compared exactly, which reads keys and fingerprints of the files that only one of two
snapshots lists. Vectors are judged by samples of at most 4,096 rows of at most 16 files
(`stored_samples`): a store of a billion rows costs no more than one of a million.
"""

from collections.abc import Collection, Iterator, Sequence

from pipelines.changes import find_changes
from pipelines.errors import GuardError
from pipelines.guarding.candidate import Candidate
from pipelines.guarding.guard_limits import GuardLimits
from pipelines.guarding.vector_guards import measure_vectors
from pipelines.indexes.manifest import IndexManifest
from pipelines.lineage import Measurement, measurement_line
from pipelines.snapshots import Snapshot
from pipelines.store import Store

# Fewer deletions or rejects than this trip nothing: a share of a handful of rows says nothing.
MIN_ROWS_TO_TRIP = 20


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


def measure_index(manifest: IndexManifest, *, limits: GuardLimits) -> list[Measurement]:
    """The recall of an index, of the kind of queries that it finds least of; none if none asked."""
    recalls = manifest.recall_at(10)
    if not recalls:
        return []
    worst = min(recalls, key=lambda kind: recalls[kind])
    num_queries = next(entry.num_queries for entry in manifest.measured if entry.kind == worst)
    return [
        Measurement(
            guard="recall",
            modality=manifest.modality,
            value=recalls[worst],
            bound=limits.min_recall,
            is_tripped=recalls[worst] < limits.min_recall,
            detail=f"10 nearest of {num_queries:,} {worst} queries among {manifest.num_rows:,} "
            f"embeddings, by {manifest.factory}",
        )
    ]


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
