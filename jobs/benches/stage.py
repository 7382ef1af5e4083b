"""Measures the encode stage by itself, as its actor runs it: decoding and encoding side by side.

Knows nothing of Ray. Images are in memory; beside `bench decode` and `bench encode` it shows what
the two cost each other, beside `bench pipeline` what all the rest costs.
"""

import itertools
import multiprocessing
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from engine.backends.choice import Backend, choose_backend, this_machine
from engine.errors import DeviceError
from engine.preprocess import Preprocessing
from engine.registry import Registry
from pipelines import schema
from pipelines.catalog import CatalogConfig, check_has_rows, open_catalog
from pipelines.cluster.resources import Resources
from pipelines.decode import RowLimits, decode_batch
from pipelines.encode import EncodeStage
from pipelines.engines import EngineChoice, Execution, chosen_engine, ready_engine
from pipelines.errors import CatalogError
from pipelines.metrics import Metric
from pipelines.progress import StageMeter
from pipelines.reading import CatalogDatasource, all_rows
from pipelines.schema import Decoder
from pipelines.snapshots import EngineRecord
from pipelines.stages import CALLS_OF_GPU_ENCODER, default_batch_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """What is measured."""

    catalog_uri: str
    """With image bytes."""
    engine: EngineChoice
    """Engine, backend and decoder; `auto` decodes on the GPU that the engine runs on."""
    num_images: int = 512
    """Distinct ones at most; batches see them again and again."""
    batch_rows: int | None = None
    """Of a call; None: as many as in a run."""
    num_calls: int = CALLS_OF_GPU_ENCODER
    """At once, where a GPU decodes; or else one."""
    seconds: float = 3.0
    """Of a run."""
    num_runs: int = 5
    """The median one counts."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name in ("num_images", "batch_rows", "num_calls", "num_runs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if self.seconds <= 0:
            raise ValueError(f"seconds={self.seconds}: expected more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFigures:
    """What the stage does here."""

    engine_id: str
    """The engine."""
    backend: Backend
    """What executes it."""
    decoder: Decoder
    """What decodes; `cpu`: images come decoded."""
    num_calls: int
    """At once."""
    batch_rows: int
    """Of a call."""
    images_per_second: float
    """Of the median run."""
    all_runs: tuple[float, ...]
    """Images/s of each run, ascending."""
    decode_per_second: float
    """Images by the seconds in which the GPU's decoder was busy with them; 0: it had none."""
    encode_per_second: float
    """Images by the seconds in which the encoder was busy with them."""


def measure_stage(config: StageConfig) -> StageFigures:
    """Time the stage in a process of its own.

    Raises:
        CatalogError: The catalog has no images.
        CheckpointError, EngineError, DeviceError: The engine cannot be had or run here, or the GPU
            cannot decode; unlike a run, `auto` does not fall back to CPUs then.
    """
    registry = Registry(config.engine.engines_uri)
    record = chosen_engine(config.engine, registry=registry)
    manifest = ready_engine(record, registry=registry).manifest
    backend = choose_backend(
        config.engine.backend, precision=manifest.precision, machine=this_machine()
    )
    if config.engine.decoder == "gpu" and backend == "onnxruntime":
        raise DeviceError(f"--decode gpu needs an engine that runs on GPUs, {backend} does not")
    decoder = config.engine.decoder
    if decoder == "auto":
        decoder = "cpu" if backend == "onnxruntime" else "gpu"
    batch_rows = config.batch_rows or default_batch_rows(
        Execution(backend=backend, decoder=decoder)
    )
    images = _images(config, preprocessing=manifest.preprocessing, decoder=decoder)
    # A new one, in which nothing has used the GPU before the stage does.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        work = partial(
            _measure, config, record=record, backend=backend, decoder=decoder, batch_rows=batch_rows
        )
        return pool.submit(work, images).result()


def _measure(
    config: StageConfig,
    images: pa.Table,
    *,
    record: EngineRecord,
    backend: Backend,
    decoder: Decoder,
    batch_rows: int,
) -> StageFigures:
    decode_meter, meter = _Meter(), _Meter()
    stage = EncodeStage(
        engine=record,
        registry=Registry(config.engine.engines_uri),
        backend=backend,
        decoder=decoder,
        limits=RowLimits().image,
        num_threads=Resources().encoder_threads,
        dtype="float32",
        meter=meter,
        decode_meter=decode_meter,
    )
    firsts = range(0, 2 * config.num_calls * batch_rows, batch_rows)
    batches = [
        images.take([(first + row) % len(images) for row in range(batch_rows)]) for first in firsts
    ]
    num_calls = config.num_calls if decoder == "gpu" else 1
    runs = []
    with ThreadPoolExecutor(num_calls) as threads:
        # The first call of a shape prepares what later ones use.
        list(threads.map(stage, batches[:1] * num_calls))
        for one in (meter, decode_meter):
            one.reset()
        for _ in range(config.num_runs):
            until = time.perf_counter() + config.seconds
            started = time.perf_counter()
            work = partial(_until, stage, until=until, batches=batches)
            num_rows = sum(threads.map(work, range(num_calls)))
            runs.append(num_rows / (time.perf_counter() - started))
    return StageFigures(
        engine_id=record.engine_id,
        backend=backend,
        decoder=decoder,
        num_calls=num_calls,
        batch_rows=batch_rows,
        images_per_second=statistics.median(runs),
        all_runs=tuple(sorted(runs)),
        decode_per_second=decode_meter.rate(),
        encode_per_second=meter.rate(),
    )


def _images(config: StageConfig, *, preprocessing: Preprocessing, decoder: Decoder) -> pa.Table:
    """What the decode stage makes of those images that it does not reject."""
    catalog = open_catalog(CatalogConfig(uri=config.catalog_uri))
    check_has_rows(catalog)
    if "image" not in catalog.modalities:
        raise CatalogError(f"catalog {config.catalog_uri}: has no image column")
    pieces = all_rows(catalog, paths=[file.path for file in catalog.files])
    rows: list[pa.Table] = []
    for read in CatalogDatasource(catalog, pieces=pieces, content=["image"]).get_read_tasks(1):
        rows += cast("Any", read())
        if sum(table.num_rows for table in rows) >= config.num_images:
            break
    images = decode_batch(
        pa.concat_tables(rows).slice(0, config.num_images),
        modalities=["image"],
        preprocessing=preprocessing,
        limits=RowLimits(),
        carry_columns=[],
        decoder=decoder,
    )
    images = images.filter(pc.is_null(images[schema.REASON])).combine_chunks()
    if not len(images):
        raise CatalogError(f"catalog {config.catalog_uri}: none of its images decodes")
    return images


def _until(stage: EncodeStage, call: int, *, until: float, batches: Sequence[pa.Table]) -> int:
    """Rows of one batch or more, of which the last began before the end."""
    num_rows = 0
    for batch in itertools.islice(itertools.cycle(batches), call, None):
        num_rows += stage(batch).num_rows
        if time.perf_counter() >= until:
            break
    return num_rows


class _Meter(StageMeter):
    """Counts here, of several threads."""

    def __init__(self) -> None:
        super().__init__(None, stage="")
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self._num_rows, self._busy_seconds = 0, 0.0

    def count(
        self, num_rows: int, num_bytes: int, busy_seconds: float, core_seconds: float = 0.0
    ) -> None:
        with self._lock:
            self._num_rows += num_rows
            self._busy_seconds += busy_seconds

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        pass

    def rate(self) -> float:
        return self._num_rows / self._busy_seconds if self._busy_seconds else 0.0


def stage_line(figures: StageFigures) -> str:
    """The figures as a line for a terminal."""
    decoding = "decoded before"
    if figures.decoder == "gpu":
        decoding = f"the GPU's decoder {figures.decode_per_second:,.0f}/s while it works"
    lowest, highest = figures.all_runs[0], figures.all_runs[-1]
    return (
        f"{figures.engine_id} by {figures.backend}, {figures.num_calls} calls at once of "
        f"{figures.batch_rows:,} images: {figures.images_per_second:,.0f} images/s "
        f"({lowest:,.0f} to {highest:,.0f}), {decoding}, the encoder "
        f"{figures.encode_per_second:,.0f}/s"
    )
