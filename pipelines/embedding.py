"""Embeds a catalog into a store: plan, run the stages, check every key, commit one snapshot.

Knows nothing of the command line or of how progress and reports are shown.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

from engine.manifest import Manifest
from engine.redaction import public_uri, without_secrets
from engine.registry import Registry
from pipelines import schema
from pipelines.assembly import count_rejects, next_files
from pipelines.catalog import Catalog, CatalogConfig, check_has_keys, check_has_rows, open_catalog
from pipelines.cluster.cluster_nodes import node_lines
from pipelines.cluster.resources import Resources, gpus_held, num_workers
from pipelines.committing import Approve, commit_candidate
from pipelines.comparing import compared
from pipelines.counts import Counts
from pipelines.decode import RowLimits
from pipelines.engines import EngineChoice, Execution, chosen_engine
from pipelines.guarding.candidate import Candidate
from pipelines.lineage import Lineage, code_version
from pipelines.metrics import add_built
from pipelines.parent import ENGINE_CHANGES, EngineChange
from pipelines.planning import catalog_record
from pipelines.preparing import Preparation, prepare, ready_manifest
from pipelines.progress import Progress
from pipelines.rounds import Written, check_rejects, write_due
from pipelines.runs.run_ids import new_run_id
from pipelines.runs.run_metrics import tell_phase, tell_plan, tell_progress, tell_snapshot
from pipelines.schema import EmbeddingDtype, Modality
from pipelines.snapshots import EngineRecord, Snapshot, snapshot_numbers
from pipelines.stages import Pass
from pipelines.store import Store
from pipelines.store_places import absolute_uri, is_read_with, store_label
from pipelines.writing import is_encoded

# Looks at what there is to do, and at the dimension of the embeddings, or raises: then nothing of
# it is done.
CheckPlan = Callable[[Counts, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """One embedding run."""

    catalog: CatalogConfig
    """What to embed."""
    store_uri: str
    """Where embeddings, rejects and snapshots go: any fsspec URI that all nodes can write."""
    engine: EngineChoice
    """What to embed it with."""
    dtype: EmbeddingDtype = "float32"
    """Of stored embeddings; float16 halves the store, but not every reader of Parquet knows it."""
    limits: RowLimits = field(default_factory=RowLimits)
    """What a row may cost and how many may fail."""
    resources: Resources = field(default_factory=Resources)
    """What the stages take of the cluster."""
    retry: tuple[str, ...] = ()
    """Reject reasons: rows rejected for them in earlier runs are tried again."""
    engine_change: EngineChange = "refuse"
    """If the store holds another engine's rows: re-embed puts rows of this one in their place."""
    command: tuple[str, ...] = ()
    """The command line, for the record; secrets in its URIs are left out."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not self.store_uri:
            raise ValueError("store uri is empty; name a folder")
        if is_read_with(self.store_uri, self.catalog.uri):
            raise ValueError(
                f"store {public_uri(self.store_uri)} lies in the catalog "
                f"{public_uri(self.catalog.uri)}, whose rows the store's files would be as well: "
                "name a folder beside it"
            )
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: expected float32 or float16")
        if self.engine_change not in ENGINE_CHANGES:
            raise ValueError(
                f"engine_change={self.engine_change!r}: expected {' or '.join(ENGINE_CHANGES)}"
            )
        unknown = set(self.retry) - schema.REASONS
        if unknown:
            raise ValueError(
                f"retry={sorted(unknown)}: no such reasons; expected of {sorted(schema.REASONS)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedResult:
    """What a run did."""

    run_id: str
    """Names the run's reports."""
    created_at: str
    """When the run ended: UTC, ISO 8601."""
    snapshot: Snapshot
    """The current snapshot: a new one, or the one before if nothing had changed."""
    committed: bool
    """Whether the snapshot is new."""
    counts: Counts
    """The plan before the run."""
    num_embedded: dict[Modality, int]
    """Rows embedded by this run."""
    num_copied: dict[Modality, int]
    """Rows whose content was embedded already, for another row, and copied by this run."""
    num_rejected: int
    """Rows of all modalities that this run rejected."""
    rejects_by_reason: dict[str, int]
    """Of the snapshot, not of this run alone."""
    progress: Progress | None
    """What the stages did; None if there was nothing to embed."""
    workers: dict[str, int]
    """Stage -> how many could work at once."""
    num_gpus: float
    """That the encoders held while the stages ran; 0 on CPUs."""
    nodes: tuple[str, ...]
    """Of the cluster, with what Ray may use of each."""
    execution: Execution
    """What executed the engine and decoded images, or would have."""


def embed(
    config: EmbedConfig,
    *,
    run_id: str | None = None,
    on_progress: Callable[[Counts, Progress], None] | None = None,
    check_plan: CheckPlan | None = None,
    approve: Approve | None = None,
) -> EmbedResult:
    """Embed what is new or changed in a catalog and commit a snapshot of all of it.

    A content that is stored under another key, or that several rows have, is embedded once and
    copied (see `pipelines.planning.modalities_by_content`).

    Ray must be initialized. Killed at any point, the same call goes on where the run stopped.

    Args:
        config: What, where to and with what.
        run_id: Of `new_run_id`, where the caller keeps a record of the run; None makes one.
        on_progress: Called about twice a second while the stages run, from another thread.
        check_plan: Called before anything is embedded; what it raises is raised.
        approve: Called before a snapshot is committed; what it raises is raised, and the same
            call, once it is let pass, embeds nothing again. It also judges a catalog without rows.

    Raises:
        CheckpointError, EngineError: The model cannot be had or does not fit the catalog.
        CatalogError: The catalog cannot be read or its schema has faults.
        StoreError: The store cannot be written or holds another model's embeddings.
        TooManyRejectsError: See `RowLimits.max_reject_share`.
        PlacementError: The cluster gave workers no place in time.
        IncompleteRunError: Rows are missing at the end (files changed while they were read).
    """
    store = Store(config.store_uri)
    catalog = open_catalog(config.catalog)
    if approve is None or not snapshot_numbers(store):
        check_has_rows(catalog)
    store_name = store_label(config.store_uri)
    registry = Registry(config.engine.engines_uri, on_built=partial(add_built, store=store_name))
    engine = chosen_engine(config.engine, registry=registry)
    store.check_writable()
    manifest_of = partial(
        ready_manifest,
        engine,
        registry=registry,
        catalog=catalog,
        resources=config.resources,
    )
    setting = prepared(config, catalog=catalog, engine=engine, manifest=manifest_of)
    parent, base, execution = setting.parent, setting.base, setting.execution
    workers = num_workers(config.resources, execution=execution)
    if parent is not None:
        tell_snapshot(config.store_uri, parent)
    written = Written()
    with compared(setting, resources=config.resources, retried=config.retry) as (ledger, staged):
        counts = ledger.counts()
        if approve is None:
            check_has_keys(catalog, num_keys=counts.num_keys)
        # Who was stopped by them is stopped again, though nothing may be left to do.
        check_rejects(
            ledger.num_rejected(),
            counts=counts,
            max_share=config.limits.max_reject_share,
            store=store,
            plan_id=setting.plan_id,
        )
        if any(counts.num_due.values()) or base is None:
            manifest = manifest_of()
            embedding_dim = manifest.embedding_dim
        else:
            embedding_dim = base.embedding_dim
        if any(counts.num_due.values()):
            if check_plan is not None:
                check_plan(counts, embedding_dim)
            pass_ = Pass(
                catalog=catalog,
                engine=engine,
                manifest=manifest,
                registry=registry,
                execution=execution,
                store=store,
                plan_id=setting.plan_id,
                dtype=config.dtype,
                limits=config.limits.beside(catalog.config.uri),
                resources=config.resources,
            )
            tell_phase(config.store_uri, "embed")
            tell_plan(config.store_uri, counts, workers=workers)
            told = partial(_told, config.store_uri, on_progress=on_progress)
            written = write_due(pass_, ledger=ledger, counts=counts, on_progress=told)
        tell_phase(config.store_uri, "assemble")
        files = next_files(
            [*setting.before, *staged, *written.files],
            committed=setting.before,
            ledger=ledger,
            key_type=catalog.key_type,
            rows_per_file=config.resources.rows_per_file,
            plan_id=setting.plan_id,
            store=store,
        )
        num_rejected = ledger.num_rejected()
    run_id = run_id or new_run_id()
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    record = catalog_record(catalog, num_keys=counts.num_keys)
    snapshot = Snapshot(
        number=1 if parent is None else parent.number + 1,
        parent=None if parent is None else parent.number,
        created_at=created_at,
        run_id=run_id,
        engine=engine,
        catalog=replace(record, uri=public_uri(absolute_uri(record.uri))),
        key_type=str(catalog.key_type),
        embedding_dim=embedding_dim,
        embedding_dtype=config.dtype,
        modalities=catalog.modalities,
        files=tuple(sorted(files, key=lambda file: file.path)),
        backend=execution.backend,
        decoder=execution.decoder,
        lineage=Lineage(
            plan=counts.keys,
            code_version=code_version(),
            command=without_secrets(config.command),
        ),
    )
    candidate = Candidate(
        snapshot=snapshot,
        parent=parent,
        encoded=tuple(
            file
            for file in (*staged, *written.encoded)
            if file.kind == "embeddings" and is_encoded(file)
        ),
        counts=counts,
        num_rejected=num_rejected,
    )
    snapshot = commit_candidate(candidate, before=setting.before, store=store, approve=approve)
    rejects_by_reason = count_rejects(store, snapshot.files_of("rejects"))
    tell_snapshot(config.store_uri, snapshot, rejects_by_reason=rejects_by_reason)
    return EmbedResult(
        run_id=run_id,
        created_at=created_at,
        snapshot=snapshot,
        committed=parent is None or snapshot.number != parent.number,
        counts=counts,
        num_embedded=written.num_embedded(catalog.modalities),
        num_copied=written.num_copied(catalog.modalities),
        num_rejected=written.num_rejected,
        rejects_by_reason=rejects_by_reason,
        progress=written.progress,
        workers=workers,
        num_gpus=gpus_held(config.resources, execution=execution),
        nodes=node_lines(),
        execution=execution,
    )


def _told(
    store_uri: str,
    counts: Counts,
    progress: Progress,
    *,
    on_progress: Callable[[Counts, Progress], None] | None,
) -> None:
    tell_progress(store_uri, counts, progress)
    if on_progress is not None:
        on_progress(counts, progress)


def prepared(
    config: EmbedConfig,
    *,
    catalog: Catalog,
    engine: EngineRecord,
    manifest: Callable[[], Manifest],
) -> Preparation:
    """As `prepare`, of a run's configuration; `manifest` is its `ready_manifest`."""
    return prepare(
        config.engine,
        catalog=catalog,
        store=Store(config.store_uri),
        engine=engine,
        engine_change=config.engine_change,
        dtype=config.dtype,
        limits=config.limits,
        placement=config.resources.placement,
        ready_manifest=manifest,
    )
