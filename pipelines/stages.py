"""Runs due rows through the stages read, decode, encode and write on Ray Data.

Where GPUs decode, the stages are read, prepare, decode and encode in one actor, and write.

Knows nothing of snapshots or of why the rows are due.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

from engine.manifest import Manifest
from engine.registry import Registry
from pipelines import schema
from pipelines.catalog import Catalog
from pipelines.cluster.autoscaler import can_grow
from pipelines.cluster.resources import (
    Resources,
    check_room,
    encoder_bounds,
    num_cpus,
    wanted_workers,
)
from pipelines.cluster.watched_runs import PlacementCallback, placement_watched
from pipelines.decode import RowLimits, decode_batch
from pipelines.encode import EncodeStage, embedding_type
from pipelines.engines import Execution
from pipelines.ledger import DueRows
from pipelines.progress import StageMeter
from pipelines.reading import CatalogDatasource, RowGroupRows, num_blocks
from pipelines.resilience.controls import rows_to_encode
from pipelines.resilience.survival import EncodeActor, decode_task
from pipelines.snapshots import EngineRecord, StoredFile
from pipelines.store import Store
from pipelines.store_places import store_label
from pipelines.writing import stored_files, write_batch

# Blocks between the stages: a task takes one block, so they are large enough that starting tasks
# costs little, and small enough that few rows are in flight. Texts are short.
IMAGE_BLOCK_BYTES = 16 * 2**20
TEXT_BLOCK_BYTES = 2**20
# Of the object store, for blocks between the stages, for each CPU of the cluster; keeps memory flat
# on long runs. With half of it, a stand-in for an encoder as fast as an H200's waited for images
# beside 16 CPUs.
IN_FLIGHT_BYTES_PER_CPU = 256 * 2**20
# For the counts, which come from an actor beside the driver; nothing is scheduled meanwhile.
COUNT_SECONDS = 2.0
# Where GPUs decode: nvJPEG decodes two batches, two are encoded, others come or go.
CALLS_OF_GPU_ENCODER = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One pass of rows through the stages: from where, with what, to where."""

    catalog: Catalog
    """What is read."""
    engine: EngineRecord
    """What encodes."""
    manifest: Manifest
    """Of that engine."""
    registry: Registry
    """Where the engine is kept."""
    execution: Execution
    """What executes it, and where images are decoded."""
    store: Store
    """Where to."""
    plan_id: str
    """Under which the files are found again."""
    dtype: schema.EmbeddingDtype
    """Of stored embeddings."""
    limits: RowLimits
    """What a row may cost."""
    resources: Resources
    """What the stages take of the cluster."""


def run_stages(pass_: Pass, *, due: Sequence[DueRows], board: Any) -> Generator[list[StoredFile]]:
    """Embed due rows; yields the files as they are written.

    A file that a worker wrote before it died, and did not report, is not among them.

    On a cluster that stays as it is, with less room than the stages need, they would wait forever:
    that is a ValueError. Where nodes may come, PlacementError ends the wait (`Placement`).

    Args:
        pass_: From where, with what, to where.
        due: The rows.
        board: Handle of the ProgressBoard that the stages report to.
    """
    catalog, resources = pass_.catalog, pass_.resources
    execution = pass_.execution
    meter = partial(StageMeter, board, store=store_label(pass_.store.uri))
    on_cpus = execution.backend == "onnxruntime"
    on_gpus = execution.decoder == "gpu"
    batch_rows = resources.batch_rows or default_batch_rows(execution)
    check_room(resources, execution=execution)
    min_encoders, max_encoders = encoder_bounds(resources, execution=execution)
    pieces = list(_pieces(catalog, due))
    source = CatalogDatasource(
        catalog,
        pieces=pieces,
        content=catalog.modalities,
        meter=meter(stage="read"),
    )
    # Where GPUs decode, Ray Data reads and prepares in one task, for which both must ask alike.
    read_cpus = resources.decode_cpus if on_gpus else resources.io_cpus
    # One for each piece, or Ray could not read and prepare in one task.
    read = ray.data.read_datasource(
        source, num_cpus=read_cpus, override_num_blocks=num_blocks(pieces)
    )
    decoded = read.map_batches(
        partial(
            decode_task,
            decode=partial(
                decode_batch,
                modalities=catalog.modalities,
                preprocessing=pass_.manifest.preprocessing,
                limits=pass_.limits,
                carry_columns=catalog.config.carry_columns,
                decoder=execution.decoder,
            ),
            modalities=catalog.modalities,
            carry_columns=catalog.config.carry_columns,
            max_bytes=pass_.limits.max_row_bytes,
            meter=meter(stage="prepare" if on_gpus else "decode"),
        ),
        batch_format="pyarrow",
        batch_size=None if on_gpus else batch_rows,
        num_cpus=resources.decode_cpus,
    )
    encoded = decoded.map_batches(
        EncodeActor,
        fn_constructor_kwargs={
            "load": partial(
                EncodeStage,
                engine=pass_.engine,
                registry=pass_.registry,
                backend=execution.backend,
                decoder=execution.decoder,
                limits=pass_.limits.image,
                num_threads=resources.encoder_threads,
                dtype=pass_.dtype,
            ),
            "control": partial(
                rows_to_encode,
                modalities=catalog.modalities,
                preprocessing=pass_.manifest.preprocessing,
                decoder=execution.decoder,
            ),
            "max_bytes": pass_.limits.max_row_bytes,
            "type_": embedding_type(embedding_dim=pass_.manifest.embedding_dim, dtype=pass_.dtype),
            "meter": meter(stage="encode"),
            "decode_meter": meter(stage="decode"),
        },
        batch_format="pyarrow",
        batch_size=batch_rows,
        num_cpus=resources.encoder_cpus,
        num_gpus=0 if on_cpus else resources.encoder_gpus,
        accelerator_type=None if on_cpus else resources.placement.accelerator_type,
        compute=ActorPoolStrategy(
            min_size=min_encoders,
            max_size=max_encoders,
            max_concurrent_calls_per_actor=CALLS_OF_GPU_ENCODER if on_gpus else 1,
            # In the thread of Ray's task: only there it is known how often it was begun.
            enable_true_multi_threading=True,
        ),
    )
    reports = encoded.map_batches(
        partial(
            write_batch,
            store=pass_.store,
            plan_id=pass_.plan_id,
            engine_id=pass_.engine.engine_id,
            embeddings_schema=schema.embeddings_schema(
                key_type=catalog.key_type,
                embedding_dim=pass_.manifest.embedding_dim,
                dtype=pass_.dtype,
                carried=catalog.carried,
            ),
            meter=meter(stage="write"),
        ),
        batch_format="pyarrow",
        batch_size=resources.rows_per_file,
        num_cpus=resources.io_cpus,
    )
    with placement_watched(
        wanted_workers(resources, execution=execution),
        placement=resources.placement,
        progress=partial(_num_counted, board),
    ):
        for report in reports.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield stored_files(report)


def default_batch_rows(execution: Execution) -> int:
    """Rows that an encode stage gets at once, where nothing else was asked for."""
    if execution.backend == "onnxruntime":
        return 32
    return 1024 if execution.decoder == "gpu" else 256


@contextmanager
def ray_data_settings(*, modalities: Sequence[schema.Modality]) -> Iterator[None]:
    """Keep Ray Data quiet, watched and within its share of the object store for a block's length.

    Where an autoscaler gives the nodes, the share is Ray Data's own, which grows with them.
    """
    context = DataContext.get_current()
    settings = {
        "enable_progress_bars": False,
        "enable_auto_log_stats": False,
        "target_max_block_size": IMAGE_BLOCK_BYTES if "image" in modalities else TEXT_BLOCK_BYTES,
        "raise_original_map_exception": True,
        "custom_execution_callback_classes": [PlacementCallback],
        "execution_no_progress_timeout_s": -1,  # PlacementCallback ends runs
    }
    before = {name: getattr(context, name) for name in settings}
    limits = context.execution_options.resource_limits
    for name, value in settings.items():
        setattr(context, name, value)
    in_flight_bytes = None if can_grow() else IN_FLIGHT_BYTES_PER_CPU * max(1, int(num_cpus()))
    context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=in_flight_bytes
    )
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.execution_options.resource_limits = limits


def _num_counted(board: Any) -> float:
    progress = ray.get(board.progress.remote(), timeout=COUNT_SECONDS)
    return float(sum(count.num_rows for count in progress.stages.values()))


def _pieces(catalog: Catalog, due: Sequence[DueRows]) -> Iterator[RowGroupRows]:
    by_path = {file.path: file for file in catalog.files}
    for rows in due:
        first_row = 0
        for row_group, num_rows in enumerate(by_path[rows.path].row_groups):
            low, high = rows.rows.searchsorted([first_row, first_row + num_rows])
            if low < high:
                yield RowGroupRows(
                    path=rows.path,
                    row_group=row_group,
                    first_row=first_row,
                    rows=rows.rows[low:high],
                    wanted={name: flags[low:high] for name, flags in rows.wanted.items()},
                )
            first_row += num_rows
