"""One night of a store: embed, ask the guards, index, check the index, commit.

Knows nothing of the command line or of schedules. Readers see a night whole or not at all: the
index is there before the commit, which is the promotion.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial

from pipelines.counts import Counts
from pipelines.embedding import EmbedConfig, EmbedResult, Plan, embed, plan
from pipelines.guards import GuardLimits, check, measure, measure_index
from pipelines.indexing import IndexManifest, find_index, index_snapshot, remove_index
from pipelines.lineage import GUARDS, GuardName, Measurement
from pipelines.progress import Progress
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

    def approve(candidate: Snapshot, parent: Snapshot | None) -> Snapshot:
        nonlocal built
        outcome = "Nothing was committed, and what was embedded is kept."
        found = measure(store, candidate, parent, limits=config.limits)
        check(found, accepted=config.accepted, outcome=outcome)
        built = _missing(store, candidate)
        index_snapshot(store, candidate, max_memory_bytes=config.max_memory_bytes)
        found += _measured_index(store, candidate, config=config, built=built)
        check(found, accepted=config.accepted, outcome=outcome)
        return _with_verdict(candidate, found)

    result = embed(_embed_config(config), on_progress=on_progress, approve=approve)
    if not result.committed:
        built = _missing(store, result.snapshot)
    indexes = index_snapshot(store, result.snapshot, max_memory_bytes=config.max_memory_bytes)
    if built and not result.committed:
        check(
            _measured_index(store, result.snapshot, config=config, built=built),
            accepted=config.accepted,
            outcome=f"Snapshot {result.snapshot.number} is current, and stays without this index.",
        )
    return NightResult(embedded=result, indexes=indexes, num_indexes_built=len(built))


def _embed_config(config: NightlyConfig) -> EmbedConfig:
    limits = config.embed.limits
    if "rejects" in config.accepted:
        limits = replace(limits, max_reject_share=1.0)
    return replace(config.embed, engine_change="re-embed", limits=limits)


def _missing(store: Store, snapshot: Snapshot) -> list[Modality]:
    """Modalities without an index."""
    find = partial(find_index, store, snapshot)
    return [modality for modality in snapshot.modalities if find(modality=modality) is None]


def _measured_index(
    store: Store, snapshot: Snapshot, *, config: NightlyConfig, built: Collection[Modality]
) -> list[Measurement]:
    """Measure the indexes, and remove those just built that trip: nobody shall find them later."""
    found = measure_index(store, snapshot, limits=config.limits)
    tripped = {measurement.modality for measurement in found if measurement.is_tripped}
    for modality in built:
        if modality in tripped and "recall" not in config.accepted:
            remove_index(store, snapshot, modality=modality)
    return found


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
