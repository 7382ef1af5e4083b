"""Measures how fast an engine encodes here, over batch sizes, beside transformers on the same rows.

Knows nothing of catalogs: the rows are drawn scenes and their captions. Each encoder has a process
of its own, so that memory is its own, too.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from engine.backends.choice import Backend, choose_backend, load_encoder, this_machine
from engine.checkpoint import Checkpoint, find_checkpoint
from engine.images import ImageLimits
from engine.manifest import TOKENIZER_FILE, Manifest
from engine.model import load_model
from engine.plans.plan import QUERY
from engine.preprocess import decode_pixels
from engine.progress import OnProgress
from engine.registry import Registry
from engine.tokenization import Tokenizer
from jobs.benches.baselines import TransformersEncoder
from jobs.benches.encode_figures import EncodeFigures, EncoderFigures, Timing
from jobs.benches.memory import MemoryWatch
from jobs.benches.product_rate import product_rate
from jobs.demo.catalog import sample_rows
from pipelines.engines import EngineChoice, chosen_engine, ready_engine
from pipelines.snapshots import EngineRecord

NUM_SCENES = 64
"""Distinct rows, which also show that the encoders agree."""
STREAM_BATCHES = 8
"""Batches given at once, so that an encoder can work on several."""
MAX_CALLS = 100
BATCH_SIZES = (1, 8, 32, 128)

Encode = Callable[[Any], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """What is measured."""

    engine: EngineChoice
    """The engine."""
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    """Rows of one call."""
    min_calls: int = 5
    """At least so many calls of each batch size are timed: figures are their medians."""
    seconds: float = 2.0
    """As long as calls go on, up to 100 of them."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes}: expected at least 1 each")
        if self.min_calls < 1:
            raise ValueError(f"min_calls={self.min_calls}: expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What a process measures; found again there by names, since models do not travel."""

    config: EncodeConfig
    record: EngineRecord
    backend: Backend
    baseline: str | None
    """Number type of transformers' model; None for the engine."""
    compiled: bool = False
    is_timed: bool = True
    """Or else only its embeddings are wanted."""


def measure_encode(config: EncodeConfig, *, on_progress: OnProgress) -> Iterator[EncodeFigures]:
    """Time an engine and its baselines, one after the other.

    Yields the figures of those measured so far after each, so that one that takes too long costs
    nothing of the others: transformers in float32, with which all are compared, the engine, and
    on a GPU transformers in 16 bit, eager and by torch.compile.

    Args:
        config: What.
        on_progress: Called with the encoder's name, and how many of how many are done.

    Raises:
        CheckpointError, EngineError, DeviceError: The engine cannot be had or run here.
    """
    registry = Registry(config.engine.engines_uri)
    record = chosen_engine(config.engine, registry=registry)
    manifest = ready_engine(record, registry=registry).manifest
    machine = this_machine()
    backend = choose_backend(config.engine.backend, precision=manifest.precision, machine=machine)
    on_gpu = backend != "onnxruntime"
    task_of = partial(_Task, config=config, record=record, backend=backend)
    # On a GPU nobody would run float32, which is only what the others are compared with.
    tasks = [task_of(baseline="float32", is_timed=not on_gpu), task_of(baseline=None)]
    if on_gpu:
        tasks += [task_of(baseline="float16"), task_of(baseline="bfloat16", compiled=True)]
    on_progress("product rate", 0, len(tasks))
    figures = EncodeFigures(
        engine_id=record.engine_id,
        checkpoint=record.checkpoint,
        device=machine.architecture or f"{_num_cores()} CPU cores",
        product_tflops=_in_process(product_rate, "cuda" if on_gpu else "cpu"),
        product_type={"fp32": "float32", "fp16": "float16", "fp8": "float8"}[manifest.precision]
        if on_gpu
        else "float32",
        pixels_on_gpu=_takes_gpu_pixels(backend),
    )
    exact = None
    for number, task in enumerate(tasks):
        on_progress(_name(task, manifest), number, len(tasks))
        encoder, embeddings = _in_process(_measure, task)
        exact = exact or embeddings
        encoder = _compared(encoder, embeddings, exact)
        figures = replace(figures, encoders=(*figures.encoders, encoder))
        yield figures


def _takes_gpu_pixels(backend: Backend) -> bool:
    """Whether the pipeline's pixels need not leave the GPU that decoded them."""
    return backend == "torch"


def _in_process(work: Callable[[Any], Any], argument: Any) -> Any:
    # Spawned: a forked child would share what torch and CUDA hold here.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, argument).result()


def _name(task: _Task, manifest: Manifest) -> str:
    if task.baseline is None:
        return f"{manifest.precision} {task.backend}"
    return f"transformers {task.baseline}{', torch.compile' if task.compiled else ''}"


def _measure(task: _Task) -> tuple[EncoderFigures, dict[str, NDArray[np.float32]]]:
    """Time one encoder; returns its figures and its embeddings of the distinct rows."""
    torch.set_num_threads(_num_cores())
    registry = Registry(task.config.engine.engines_uri)
    engine = ready_engine(task.record, registry=registry)
    manifest = engine.manifest
    checkpoint = find_checkpoint(task.record.checkpoint, revision=task.record.revision)
    scenes = sample_rows(NUM_SCENES)
    rows: dict[str, Any] = {
        "image": np.stack(
            [
                decode_pixels(
                    scene.image, preprocessing=manifest.preprocessing, limits=ImageLimits()
                )
                for scene in scenes
            ]
        )
    }
    tokenizer = None
    if manifest.text is not None:
        rows["text"] = np.array([scene.text for scene in scenes], dtype=object)
        tokenizer = Tokenizer(engine.directory / TOKENIZER_FILE, text=manifest.text)
    flops = _flops(checkpoint, rows, tokenizer=tokenizer)
    with MemoryWatch(os.getpid()) as watch:
        started = time.perf_counter()
        bulk: Any
        if task.baseline is None:
            load = partial(
                load_encoder,
                engine,
                backend=task.backend,
                registry=registry,
                num_threads=_num_cores(),
            )
            bulk = load()
            # TensorRT alone has a plan of its own for queries.
            query = load(profile=QUERY) if task.backend == "tensorrt" else bulk
        else:
            bulk = query = TransformersEncoder(
                checkpoint,
                manifest=manifest,
                device="cpu" if task.backend == "onnxruntime" else "cuda",
                dtype=getattr(torch, task.baseline),
            )
            if task.compiled:
                bulk.compile()
        load_seconds = time.perf_counter() - started
        timings = []
        for modality, chosen in rows.items() if task.is_timed else ():
            for batch_rows in task.config.batch_sizes:
                is_query = batch_rows <= QUERY.max_rows
                encoder: Any = query if is_query else bulk
                if task.baseline is not None:
                    encoder.batch_rows = batch_rows  # the engine cuts what it gets by itself
                encode = encoder.encode_images if modality == "image" else encoder.encode_texts
                on_gpu = modality == "image" and not is_query and _takes_gpu_pixels(task.backend)
                timings.append(
                    _timing(
                        encode,
                        torch.from_numpy(chosen).cuda() if on_gpu else chosen,
                        modality=modality,
                        batch_rows=batch_rows,
                        flops_per_row=flops[modality],
                        config=task.config,
                    )
                )
        found = {"image": bulk.encode_images(rows["image"])}
        if "text" in rows:
            found["text"] = bulk.encode_texts(rows["text"])
    device_bytes = getattr(bulk, "device_memory_bytes", 0)
    if task.baseline is not None and torch.cuda.is_available():
        device_bytes = torch.cuda.max_memory_reserved()
    figures = EncoderFigures(
        name=_name(task, manifest),
        load_seconds=load_seconds,
        peak_memory_bytes=watch.peak_bytes,
        device_memory_bytes=device_bytes,
        timings=tuple(timings),
    )
    return figures, found


def _timing(
    encode: Encode,
    rows: Any,
    *,
    modality: str,
    batch_rows: int,
    flops_per_row: float,
    config: EncodeConfig,
) -> Timing:
    batch = _repeated(rows, batch_rows)
    encode(batch)  # the first call of a shape prepares what later ones use
    calls = list(_calls(encode, batch, config=config))
    stream = _repeated(rows, batch_rows * STREAM_BATCHES)
    encode(stream)
    streams = list(_calls(encode, stream, config=config))
    per_second = batch_rows / statistics.median(calls)
    stream_per_second = len(stream) / statistics.median(streams)
    p50, p95, p99 = (float(1e3 * np.percentile(calls, part)) for part in (50, 95, 99))
    return Timing(
        modality=modality,
        batch_rows=batch_rows,
        num_calls=len(calls),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        rows_per_second=per_second,
        stream_rows_per_second=stream_per_second,
        tflops=flops_per_row * max(per_second, stream_per_second) / 1e12,
    )


def _repeated(rows: Any, num_rows: int) -> Any:
    """So many rows, of an array or of a tensor on a GPU, complete."""
    repeated = rows[np.arange(num_rows) % len(rows)]
    if isinstance(repeated, torch.Tensor):
        torch.cuda.synchronize()
    return repeated


def _calls(encode: Encode, batch: Any, *, config: EncodeConfig) -> Iterator[float]:
    """Seconds of each of several calls."""
    began = time.perf_counter()
    for number in range(MAX_CALLS):
        started = time.perf_counter()
        if number >= config.min_calls and started - began > config.seconds:
            return
        encode(batch)
        yield time.perf_counter() - started


def _flops(
    checkpoint: Checkpoint, rows: dict[str, Any], *, tokenizer: Tokenizer | None
) -> dict[str, float]:
    """Operations of the float32 model for one row, by modality: multiply and add count as two."""
    model = load_model(checkpoint)
    counted = {}
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            model.image_tower(torch.from_numpy(rows["image"][:1]))
        counted["image"] = float(counter.get_total_flops())
        if tokenizer is not None and model.text_tower is not None:
            total = 0
            # Each text at its own length: padding is no work that had to be done.
            for chosen, token_ids in tokenizer.batches(
                list(rows["text"]), max_rows=1, length_step=1
            ):
                with FlopCounterMode(display=False) as counter:
                    model.text_tower(torch.from_numpy(token_ids))
                total += counter.get_total_flops() * len(chosen)
            counted["text"] = total / len(rows["text"])
    return counted


def _compared(
    figures: EncoderFigures,
    found: dict[str, NDArray[np.float32]],
    exact: dict[str, NDArray[np.float32]],
) -> EncoderFigures:
    cosines = {
        name: np.einsum("nd,nd->n", found[name].astype(np.float64), exact[name]) for name in found
    }
    return replace(
        figures,
        cosine_mean={name: float(values.mean()) for name, values in cosines.items()},
        cosine_min={name: float(values.min()) for name, values in cosines.items()},
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
