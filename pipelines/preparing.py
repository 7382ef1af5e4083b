"""Prepares a run: what executes the engine, what rows stay, what the work is called.

Knows nothing of how rows are read, embedded or written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import ray

from engine.errors import EngineError
from engine.manifest import Manifest
from engine.registry import Engine, Registry
from pipelines.catalog import Catalog
from pipelines.cluster.autoscaler import can_grow
from pipelines.cluster.cluster_state import wait_for_place
from pipelines.cluster.gpu_probe import gpu_probe, num_gpus
from pipelines.cluster.placement import Placement, WorkerDemand
from pipelines.cluster.resources import Resources
from pipelines.cluster.worker_logs import redact_worker
from pipelines.decode import RowLimits
from pipelines.engines import (
    EngineChoice,
    Execution,
    chosen_backend,
    chosen_decoder,
    ready_engine,
)
from pipelines.parent import EngineChange, check_parent
from pipelines.planning import plan_id_of
from pipelines.schema import EmbeddingDtype
from pipelines.snapshots import (
    EngineRecord,
    Snapshot,
    StoredFile,
    current_snapshot,
    is_other_engine,
)
from pipelines.store import Store


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a run works with, found before it begins."""

    catalog: Catalog
    """What is to be embedded."""
    store: Store
    """Where to."""
    engine: EngineRecord
    """With what."""
    execution: Execution
    """What executes it, and decodes images."""
    plan_id: str
    """Names the work: files are written under it, and found again."""
    parent: Snapshot | None
    """The current snapshot."""
    base: Snapshot | None
    """The one whose rows stay: the current one, or None if all are to be embedded anew."""

    @property
    def before(self) -> tuple[StoredFile, ...]:
        """Files of the rows that stay."""
        return () if self.base is None else self.base.files


def prepare(
    choice: EngineChoice,
    *,
    catalog: Catalog,
    store: Store,
    engine: EngineRecord,
    engine_change: EngineChange,
    dtype: EmbeddingDtype,
    limits: RowLimits,
    placement: Placement,
    ready_manifest: Callable[[], Manifest],
) -> Preparation:
    """Choose what executes the engine, and see that its rows fit into the store.

    Args:
        choice: What was asked for.
        catalog: What is to be embedded.
        store: Where to.
        engine: What the choice came to.
        engine_change: What to do if the store holds another engine's rows.
        dtype: Of stored embeddings.
        limits: What a row may cost.
        placement: Where encoders may go, and how long a look at a GPU may wait for one.
        ready_manifest: As of `chosen_decoder`.

    Raises:
        StoreError: They do not fit, or the store cannot be read.
        DeviceError, EngineError: Nothing here executes the engine as it was asked for.
        PlacementError: No GPU could be looked at in time.
        ValueError: GPUs are to decode, and the catalog has no images.
    """
    parent = current_snapshot(store)
    is_renewed = (
        engine_change == "re-embed" and parent is not None and is_other_engine(engine, parent)
    )
    base = None if is_renewed else parent
    execution = _chosen_execution(
        choice,
        catalog=catalog,
        engine=engine,
        parent=base,
        placement=placement,
        ready_manifest=ready_manifest,
    )
    check_parent(
        parent,
        catalog=catalog,
        engine=engine,
        execution=execution,
        wanted_backend=choice.backend,
        wanted_decoder=choice.decoder,
        dtype=dtype,
        store=store,
        engine_change=engine_change,
    )
    # The share of rejects is not among them: a run stopped by it goes on when more are accepted.
    settings = [dtype, execution.backend, repr(limits.image), str(limits.max_text_chars)]
    settings += [execution.decoder] if execution.decoder != "cpu" else []
    return Preparation(
        catalog=catalog,
        store=store,
        engine=engine,
        execution=execution,
        plan_id=plan_id_of(catalog, engine=engine, settings=settings),
        parent=parent,
        base=base,
    )


def _chosen_execution(
    choice: EngineChoice,
    *,
    catalog: Catalog,
    engine: EngineRecord,
    parent: Snapshot | None,
    placement: Placement,
    ready_manifest: Callable[[], Manifest],
) -> Execution:
    # A look would start a node, for which there may be no work: what was there before is asked for
    # again, and encoders say so if the GPUs that then come are others.
    before = parent if can_grow() and not num_gpus() else None
    with gpu_probe(placement) as look:
        if before is not None and choice.backend in ("auto", before.backend):
            backend = before.backend
        else:
            backend = chosen_backend(choice.backend, engine=engine, look=look)
        wanted = choice.decoder
        if "image" not in catalog.modalities:
            if wanted == "gpu":
                raise ValueError("--decode gpu: the catalog has no images")
            return Execution(backend=backend, decoder="cpu")
        if before is not None and wanted in ("auto", before.decoder) and backend == before.backend:
            return Execution(backend=backend, decoder=before.decoder)
        # CPUs can always do what they did before.
        if wanted == "auto" and parent is not None and parent.decoder == "cpu":
            wanted = "cpu"
        decoder = chosen_decoder(wanted, backend=backend, ready_manifest=ready_manifest, look=look)
    return Execution(backend=backend, decoder=decoder)


def built_manifest(engine: EngineRecord, *, registry: Registry) -> Manifest:
    """The manifest of an engine that is there; EngineError if it is not: none is built."""
    manifest = registry.manifest(engine.engine_id)
    if manifest is None:
        raise EngineError(
            f"engines {registry.uri}: engine {engine.engine_id} is not built, and looking alone "
            "builds none: run without --dry-run, or `clipmill engine build` first"
        )
    return manifest


def _built(engine: EngineRecord, *, registry: Registry) -> Engine:
    redact_worker()
    return ready_engine(engine, registry=registry)


def ready_manifest(
    engine: EngineRecord, *, registry: Registry, catalog: Catalog, resources: Resources
) -> Manifest:
    """The manifest of an engine, which a worker builds if it is not there.

    Raises:
        CheckpointError: It cannot be built.
        EngineError: The same, or it lacks a tower for what the catalog holds.
        PlacementError: That worker got no place in time.
    """
    manifest = registry.manifest(engine.engine_id)
    if manifest is None:
        # In a worker: building takes torch, which the driver then need not hold.
        build: Any = ray.remote(cast("Any", _built))
        build = build.options(num_cpus=resources.decode_cpus)
        built = build.remote(engine, registry=registry)
        building = WorkerDemand(
            what="building the engine",
            resources={"CPU": resources.decode_cpus},
            kind="task",
            option="--decode-cpus",
        )
        wait_for_place([built], wanted=building, placement=resources.placement)
        manifest = cast("Engine", ray.get(built)).manifest
    absent = [name for name in catalog.modalities if name not in manifest.modalities]
    if absent:
        leave_out = " ".join(f"--{modality}-column none" for modality in absent)
        raise EngineError(
            f"checkpoint {manifest.checkpoint} has no {' or '.join(absent)} tower, the catalog has "
            f"such a column; leave it out with {leave_out}"
        )
    return manifest
