"""Embeds a catalog into a store: plan, run the stages, check every key, commit one snapshot.

Knows nothing of the command line or of how progress and reports are shown.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

import ray

from engine.errors import EngineError
from engine.manifest import Manifest
from engine.registry import Engine, Registry
from pipelines import schema
from pipelines.assembly import count_rejects, next_files
from pipelines.catalog import Catalog, CatalogConfig, open_catalog
from pipelines.counts import Counts
from pipelines.decode import RowLimits
from pipelines.engines import (
    EngineChoice,
    Execution,
    chosen_backend,
    chosen_decoder,
    chosen_engine,
    ready_engine,
)
from pipelines.errors import IncompleteRunError
from pipelines.ledger import Ledger
from pipelines.parent import check_parent, same_state
from pipelines.planning import (
    catalog_record,
    fill,
    modalities_by_content,
    plan_id_of,
    staged_files,
)
from pipelines.progress import Progress
from pipelines.rounds import Written, write_due
from pipelines.schema import EmbeddingDtype, Modality
from pipelines.snapshots import (
    EngineRecord,
    Snapshot,
    commit,
    current_snapshot,
    missing_files,
)
from pipelines.stages import Pass, Resources, num_workers, ray_data_settings
from pipelines.store import Store


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

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not self.store_uri:
            raise ValueError("store uri is empty; name a folder")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: expected float32 or float16")
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
    rejects_by_reason: dict[str, int]
    """Of the snapshot, not of this run alone."""
    progress: Progress | None
    """What the stages did; None if there was nothing to embed."""
    workers: dict[str, int]
    """Stage -> how many could work at once."""
    execution: Execution
    """What executed the engine and decoded images, or would have."""


def embed(
    config: EmbedConfig, *, on_progress: Callable[[Counts, Progress], None] | None = None
) -> EmbedResult:
    """Embed what is new or changed in a catalog and commit a snapshot of all of it.

    A content that is stored under another key, or that several rows have, is embedded once and
    copied (see `pipelines.planning.modalities_by_content`).

    Ray must be initialized. Killed at any point, the same call goes on where the run stopped.

    Args:
        config: What, where to and with what.
        on_progress: Called about twice a second while the stages run, from another thread.

    Raises:
        CheckpointError, EngineError: The model cannot be had or does not fit the catalog.
        CatalogError: The catalog cannot be read or its schema has faults.
        StoreError: The store cannot be written or holds another model's embeddings.
        TooManyRejectsError: See `RowLimits.max_reject_share`.
        IncompleteRunError: Rows are missing at the end (files changed while they were read).
    """
    store = Store(config.store_uri)
    catalog = open_catalog(config.catalog)
    registry = Registry(config.engine.engines_uri)
    engine = chosen_engine(config.engine, registry=registry)
    store.check_writable()
    parent = current_snapshot(store)
    execution = _chosen_execution(
        config, catalog=catalog, engine=engine, registry=registry, parent=parent
    )
    check_parent(
        parent,
        catalog=catalog,
        engine=engine,
        execution=execution,
        wanted_backend=config.engine.backend,
        wanted_decoder=config.engine.decoder,
        dtype=config.dtype,
        store=store,
    )
    limits = config.limits
    # The share of rejects is not among them: a run stopped by it goes on when more are accepted.
    settings = [config.dtype, execution.backend, repr(limits.image), str(limits.max_text_chars)]
    settings += [execution.decoder] if execution.decoder != "cpu" else []
    plan_id = plan_id_of(catalog, engine=engine, settings=settings)
    before = () if parent is None else parent.files
    written = Written()
    with (
        ray_data_settings(config.resources, modalities=catalog.modalities),
        Ledger(
            key_type=catalog.key_type,
            modalities=catalog.modalities,
            by_content=modalities_by_content(catalog),
        ) as ledger,
    ):
        staged = staged_files(store, plan_id=plan_id, committed=before)
        fill(
            ledger,
            catalog,
            parent=parent,
            staged=staged,
            store=store,
            num_cpus=config.resources.io_cpus,
            retried=config.retry,
        )
        counts = ledger.counts()
        manifest = _ready_manifest(config, engine=engine, registry=registry, catalog=catalog)
        if any(counts.num_due.values()):
            pass_ = Pass(
                catalog=catalog,
                engine=engine,
                manifest=manifest,
                registry=registry,
                execution=execution,
                store=store,
                plan_id=plan_id,
                dtype=config.dtype,
                limits=config.limits,
                resources=config.resources,
            )
            written = write_due(
                pass_, ledger=ledger, counts=counts, staged=staged, on_progress=on_progress
            )
        files = next_files(
            [*before, *staged, *written.files],
            ledger=ledger,
            key_type=catalog.key_type,
            plan_id=plan_id,
            store=store,
        )
    missing = missing_files(store, set(files).difference(before))
    if missing:
        # Those of a run killed long ago look unused until this one writes beside them.
        raise IncompleteRunError(
            f"{len(missing)} files of this run or an unfinished one are gone, {missing[0]} is one: "
            "the store was vacuumed meanwhile. Nothing was committed; run the same command again"
        )
    now = datetime.now(UTC)
    run_id = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    created_at = now.isoformat(timespec="seconds")
    snapshot = Snapshot(
        number=1 if parent is None else parent.number + 1,
        parent=None if parent is None else parent.number,
        created_at=created_at,
        run_id=run_id,
        engine=engine,
        catalog=catalog_record(catalog, num_keys=counts.num_keys),
        key_type=str(catalog.key_type),
        embedding_dim=manifest.embedding_dim,
        embedding_dtype=config.dtype,
        modalities=catalog.modalities,
        files=tuple(sorted(files, key=lambda file: file.path)),
        backend=execution.backend,
        decoder=execution.decoder,
    )
    committed = parent is None or not same_state(snapshot, parent)
    if committed:
        commit(store, snapshot)
    elif parent is not None:
        snapshot = parent
    return EmbedResult(
        run_id=run_id,
        created_at=created_at,
        snapshot=snapshot,
        committed=committed,
        counts=counts,
        num_embedded=written.num_embedded(catalog.modalities),
        num_copied=written.num_copied(catalog.modalities),
        rejects_by_reason=count_rejects(store, snapshot.files_of("rejects")),
        progress=written.progress,
        workers=num_workers(config.resources, execution=execution),
        execution=execution,
    )


def _chosen_execution(
    config: EmbedConfig,
    *,
    catalog: Catalog,
    engine: EngineRecord,
    registry: Registry,
    parent: Snapshot | None,
) -> Execution:
    backend = chosen_backend(config.engine.backend, engine=engine)
    wanted = config.engine.decoder
    if "image" not in catalog.modalities:
        if wanted == "gpu":
            raise ValueError("--decode gpu: the catalog has no images")
        return Execution(backend=backend, decoder="cpu")
    # CPUs can always do what they did before.
    if wanted == "auto" and parent is not None and parent.decoder == "cpu":
        wanted = "cpu"
    ready = partial(_ready_manifest, config, engine=engine, registry=registry, catalog=catalog)
    decoder = chosen_decoder(wanted, backend=backend, ready_manifest=ready)
    return Execution(backend=backend, decoder=decoder)


def _ready_manifest(
    config: EmbedConfig, *, engine: EngineRecord, registry: Registry, catalog: Catalog
) -> Manifest:
    manifest = registry.manifest(engine.engine_id)
    if manifest is None:
        # In a worker: building takes torch, which the driver then need not hold.
        build: Any = ray.remote(cast("Any", ready_engine))
        build = build.options(num_cpus=config.resources.decode_cpus)
        manifest = cast("Engine", ray.get(build.remote(engine, registry=registry))).manifest
    absent = [name for name in catalog.modalities if name not in manifest.modalities]
    if absent:
        leave_out = " ".join(f"--{modality}-column none" for modality in absent)
        raise EngineError(
            f"checkpoint {manifest.checkpoint} has no {' or '.join(absent)} tower, the catalog has "
            f"such a column; leave it out with {leave_out}"
        )
    return manifest
