"""One night of a store: embed, ask the guards, index, check the index, commit.

Knows nothing of the command line or of schedules. Readers see a night whole or not at all: the
index is there before the commit, which is the promotion.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from pipelines.candidate import Candidate
from pipelines.counts import Counts
from pipelines.embedding import EmbedConfig, EmbedResult, Plan, embed, plan
from pipelines.guard_limits import GuardLimits
from pipelines.guards import MIN_ROWS_TO_TRIP, check, measure, measure_index
from pipelines.index_manifest import (
    IndexManifest,
    index_dir,
    missing_indexes,
    remove_index,
)
from pipelines.indexing import check_max_memory_bytes, check_memory, index_snapshot
from pipelines.lineage import GUARDS, GuardName, Measurement
from pipelines.progress import Progress
from pipelines.rounds import has_too_many_rejects
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot
from pipelines.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class NightlyConfig:
    """One night."""

    embed: EmbedConfig
    """What to embed, where to and with what; a change of engine re-embeds everything."""
    limits: GuardLimits = field(default_factory=GuardLimits)
    """How far the new snapshot may be from the one before."""
    accepted: tuple[GuardName, ...] = ()
    """Guards that may trip this time."""
    max_memory_bytes: int | None = None
    """For indexing, as `IndexConfig.max_memory_bytes`."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        check_max_memory_bytes(self.max_memory_bytes)
        unknown = set(self.accepted).difference(GUARDS)
        if unknown:
            raise ValueError(
                f"accepted={sorted(unknown)}: no such guards; expected of {', '.join(GUARDS)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class NightResult:
    """What a night did."""

    embedded: EmbedResult
    """Its snapshot is current; `committed` says whether it is new."""
    indexes: list[IndexManifest]
    """Of that snapshot."""
    num_indexes_built: int
    """Of them, by this night."""


def plan_night(config: NightlyConfig) -> Plan:
    """Find out what `run_night` would do; nothing is written to the store, no engine is built."""
    return plan(_embed_config(config))


def run_night(
    config: NightlyConfig, *, on_progress: Callable[[Counts, Progress], None] | None = None
) -> NightResult:
    """Make the store's state that of the catalog, with its index, or leave it as it was.

    Ray must be initialized. Killed at any point, the same call goes on where the run stopped. If
    there is nothing to do, only an index of the current snapshot that is missing is built.

    Args:
        config: What, where to, with what, and within what bounds.
        on_progress: Called about twice a second while rows are embedded, from another thread.

    Raises:
        GuardError: Guards tripped; nothing was committed, and what was embedded is kept.
        CommitConflictError: Another run committed first; what was embedded is kept.
        PipelineError, EngineError, CheckpointError: As of `embed` and `index_snapshot`.
    """
    store = Store(config.embed.store_uri)
    built: list[Modality] = []

    def approve(candidate: Candidate) -> Snapshot:
        nonlocal built
        snapshot = candidate.snapshot
        outcome = "Nothing was committed, and what was embedded is kept."
        found = measure(store, candidate, limits=config.limits)
        found += _rejects_let_pass(candidate, config=config)
        check(found, accepted=config.accepted, outcome=outcome)
        built = missing_indexes(store, snapshot)
        index_snapshot(store, snapshot, max_memory_bytes=config.max_memory_bytes)
        served = _index_dirs(candidate.parent)
        found += _measured_index(store, snapshot, config=config, served=served)
        check(found, accepted=config.accepted, outcome=outcome)
        return _with_verdict(snapshot, found)

    result = embed(
        _embed_config(config),
        on_progress=on_progress,
        check_plan=partial(_check_memory, config=config),
        approve=approve,
    )
    if not result.committed:
        built = missing_indexes(store, result.snapshot)
    indexes = index_snapshot(store, result.snapshot, max_memory_bytes=config.max_memory_bytes)
    if built and not result.committed:
        of_built = {index_dir(result.snapshot, modality=modality) for modality in built}
        served = _index_dirs(result.snapshot) - of_built
        check(
            _measured_index(store, result.snapshot, config=config, served=served),
            accepted=config.accepted,
            outcome=f"Snapshot {result.snapshot.number} is current, and stays without this index.",
        )
    return NightResult(embedded=result, indexes=indexes, num_indexes_built=len(built))


def _check_memory(counts: Counts, embedding_dim: int, *, config: NightlyConfig) -> None:
    """Refuse, before hours of embedding, what could not be indexed in the end.

    How many rows will be rejected nobody knows; of more than those counted here a guard trips.
    """
    most_rejects = max(int(config.limits.max_rejects * counts.num_keys), MIN_ROWS_TO_TRIP - 1)
    if "rejects" not in config.accepted:
        for num_due in counts.num_due.values():
            if num_due:  # else the index may be there already
                check_memory(
                    num_rows=max(counts.num_keys - most_rejects, 0),
                    embedding_dim=embedding_dim,
                    max_memory_bytes=config.max_memory_bytes,
                )


def _embed_config(config: NightlyConfig) -> EmbedConfig:
    limits = config.embed.limits
    if "rejects" in config.accepted:
        limits = replace(limits, max_reject_share=1.0)
    return replace(config.embed, engine_change="re-embed", limits=limits)


def _rejects_let_pass(candidate: Candidate, *, config: NightlyConfig) -> Iterator[Measurement]:
    """What would have stopped the run, were it not accepted."""
    counts, max_share = candidate.counts, config.embed.limits.max_reject_share
    if has_too_many_rejects(candidate.num_rejected, counts=counts, max_share=max_share):
        yield Measurement(
            guard="rejects",
            modality=None,
            value=candidate.num_rejected / counts.num_planned,
            bound=max_share,
            is_tripped=True,
            detail=f"{candidate.num_rejected:,} of {counts.num_planned:,} rows that were to be "
            "done",
        )


def _measured_index(
    store: Store, snapshot: Snapshot, *, config: NightlyConfig, served: Collection[str]
) -> list[Measurement]:
    """Measure the indexes, and remove those that trip: nobody shall find them later.

    Args:
        store: Where they are.
        snapshot: Whose they are.
        config: What is accepted.
        served: Folders of indexes that readers have already: they stay. One that was there
            before the run may be none of them: a run may be killed before it measures.
    """
    found = measure_index(store, snapshot, limits=config.limits)
    tripped = {measurement.modality for measurement in found if measurement.is_tripped}
    for modality in snapshot.modalities:
        is_served = index_dir(snapshot, modality=modality) in served
        if modality in tripped and not is_served and "recall" not in config.accepted:
            remove_index(store, snapshot, modality=modality)
    return found


def _index_dirs(snapshot: Snapshot | None) -> set[str]:
    if snapshot is None:
        return set()
    return {index_dir(snapshot, modality=modality) for modality in snapshot.modalities}


def _with_verdict(candidate: Snapshot, measurements: list[Measurement]) -> Snapshot:
    """The candidate, with what was measured and let pass in its lineage."""
    assert candidate.lineage is not None  # every run gives its candidate one
    tripped = {measurement.guard for measurement in measurements if measurement.is_tripped}
    return replace(
        candidate,
        lineage=replace(
            candidate.lineage,
            accepted=tuple(name for name in GUARDS if name in tripped),
            measurements=tuple(measurements),
        ),
    )
