"""One night of a store: embed, ask the guards, index, check the index, commit.

Knows nothing of the command line or of schedules. Readers see a night whole or not at all: the
index is there before the commit, which is the promotion.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from pipelines.counts import Counts
from pipelines.dry_run import Plan, plan
from pipelines.embedding import EmbedConfig, EmbedResult, embed
from pipelines.guarding.candidate import Candidate
from pipelines.guarding.guard_limits import GuardLimits
from pipelines.guarding.guards import MIN_ROWS_TO_TRIP, check, measure, measure_index
from pipelines.indexes.manifest import IndexManifest, missing_indexes
from pipelines.indexes.options import IndexOptions, recipe_for
from pipelines.indexing import index_snapshot
from pipelines.lineage import GUARDS, GuardName, Measurement
from pipelines.progress import Progress
from pipelines.rounds import has_too_many_rejects
from pipelines.runs.run_metrics import tell_indexes, tell_phase
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
    index: IndexOptions = field(default_factory=IndexOptions)
    """What its indexes shall be; the recall that they shall have is of `limits`."""

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
    config: NightlyConfig,
    *,
    run_id: str | None = None,
    on_progress: Callable[[Counts, Progress], None] | None = None,
) -> NightResult:
    """Make the store's state that of the catalog, with its index, or leave it as it was.

    Ray must be initialized. Killed at any point, the same call goes on where the run stopped. If
    there is nothing to do, only an index of the current snapshot that is missing is built.

    Args:
        config: What, where to, with what, and within what bounds.
        run_id: As for `embed`.
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
        for index in _indexed(store, snapshot, config=config, outcome=outcome):
            found += measure_index(index, limits=config.limits)
        check(found, accepted=config.accepted, outcome=outcome)
        return _with_verdict(snapshot, found)

    result = embed(
        _embed_config(config),
        run_id=run_id,
        on_progress=on_progress,
        check_plan=partial(_check_memory, config=config),
        approve=approve,
    )
    if not result.committed:
        built = missing_indexes(store, result.snapshot)
    outcome = f"Snapshot {result.snapshot.number} is current, and stays without this index."
    indexes = _indexed(store, result.snapshot, config=config, outcome=outcome)
    tell_indexes(config.embed.store_uri, indexes)
    return NightResult(embedded=result, indexes=indexes, num_indexes_built=len(built))


def _indexed(
    store: Store, snapshot: Snapshot, *, config: NightlyConfig, outcome: str
) -> list[IndexManifest]:
    """The indexes of a snapshot; GuardError before a new one is there whose recall is too low."""

    def promote(manifest: IndexManifest) -> None:
        found = measure_index(manifest, limits=config.limits)
        check(found, accepted=config.accepted, outcome=outcome)

    options = replace(config.index, min_recall=config.limits.min_recall)
    tell_phase(config.embed.store_uri, "index")
    return index_snapshot(store, snapshot, options=options, promote=promote)


def _check_memory(counts: Counts, embedding_dim: int, *, config: NightlyConfig) -> None:
    """Refuse, before hours of embedding, what could not be indexed in the end.

    How many rows will be rejected nobody knows; of more than those counted here a guard trips.
    """
    most_rejects = max(int(config.limits.max_rejects * counts.num_keys), MIN_ROWS_TO_TRIP - 1)
    if "rejects" not in config.accepted:
        for num_due in counts.num_due.values():
            if num_due:  # else the index may be there already
                recipe_for(
                    config.index,
                    num_rows=max(counts.num_keys - most_rejects, 0),
                    embedding_dim=embedding_dim,
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
