"""Measures how fast images become pixels here: by CPU cores, and by a GPU where there is one.

Knows nothing of what reads the pixels, but that an engine's embeddings of both should agree.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.choice import choose_backend, load_encoder, this_machine
from engine.decoding.channels import use_all_channels
from engine.decoding.jpeg_header import Geometry, gpu_geometry
from engine.decoding.jpegs import Jpegs, jpegs_of
from engine.errors import EngineError
from engine.images import ImageLimits
from engine.preprocess import MAX_ORDINARY_ASPECT, Preprocessing, decode_pixels
from engine.registry import Registry
from jobs.benches.catalog_rows import first_rows
from pipelines import schema
from pipelines.engines import EngineChoice, chosen_engine, ready_engine
from pipelines.errors import CatalogError
from pipelines.stages import CALLS_OF_GPU_ENCODER

if TYPE_CHECKING:  # it needs a GPU's libraries
    from engine.decoding.gpu_decoder import Decoded

BATCH_SIZES = (64, 256, 512)
MIN_CALLS, MAX_CALLS = 5, 200


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """What is measured."""

    catalog_uri: str
    """With image bytes, all of which decode."""
    engine: EngineChoice
    """Whose pixels are made, and whose embeddings of them are compared."""
    num_images: int = 512
    """Distinct ones; larger batches see them again."""
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    """Images of one call on a GPU."""
    seconds: float = 3.0
    """Of calls for each way to decode."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_images < 1:
            raise ValueError(f"num_images={self.num_images}: expected at least 1")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes}: expected at least 1 each")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTiming:
    """One way to decode."""

    name: str
    """Which."""
    batch_rows: int
    """Images of a call."""
    num_calls: int
    """Timed."""
    p50_ms: float
    """Of a call."""
    images_per_second: float
    """By the median call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeFigures:
    """All ways, on one machine."""

    device: str | None
    """The GPU."""
    num_images: int
    """Distinct images."""
    mean_bytes: float
    """Of an image, encoded."""
    timings: tuple[DecodeTiming, ...]
    """CPU cores first."""
    num_by_cpu: int = 0
    """Images that the GPU left to a CPU."""
    cosine_p1: float | None = None
    """1st percentile, between embeddings of the GPU's pixels and of the CPU's; None without GPU."""
    cosine_min: float | None = None
    """Of the worst image."""


def measure_decode(config: DecodeConfig) -> DecodeFigures:
    """Time decoding, resize and crop of a catalog's images.

    Raises:
        CatalogError: The catalog has no images.
        CheckpointError, EngineError, DeviceError: The engine cannot be had or run here.
    """
    use_all_channels()  # as the encode stage does, before anything starts CUDA
    registry = Registry(config.engine.engines_uri)
    engine = ready_engine(chosen_engine(config.engine, registry=registry), registry=registry)
    preprocessing = engine.manifest.preprocessing
    rows = first_rows(config.catalog_uri, modalities=["image"], num_rows=config.num_images)
    images: list[bytes] = rows[schema.IMAGE].to_pylist()
    num_cores = len(os.sched_getaffinity(0))
    context = get_context("spawn")
    with ProcessPoolExecutor(num_cores, mp_context=context) as processes:
        decode = partial(_by_pillow, preprocessing=preprocessing)
        list(processes.map(decode, [images[:1]] * num_cores))  # starts them all
        # Several for each core, so that none waits long for the last.
        chunk_rows = -(-len(images) // (4 * num_cores))
        chunks = [images[row : row + chunk_rows] for row in range(0, len(images), chunk_rows)]
        pixels = np.concatenate(list(processes.map(decode, chunks)))
        seconds = _calls(lambda: list(processes.map(decode, chunks)), config=config)
        timings = [_timing(f"Pillow on {num_cores} cores", seconds, batch_rows=len(images))]
    # Not by the processes: what they are sent costs more than what they do.
    found = _geometries(images)
    seconds = _calls(lambda: _geometries(images), config=config)
    timings.append(_timing("is it for a GPU? on 1 core", seconds, batch_rows=len(images)))
    mean_bytes = sum(map(len, images)) / len(images)
    machine = this_machine()
    if machine.architecture is None:
        return DecodeFigures(
            device=None, num_images=len(images), mean_bytes=mean_bytes, timings=tuple(timings)
        )
    from engine.decoding.gpu_decoder import GpuDecoder  # it needs a GPU's libraries

    backend = choose_backend(
        config.engine.backend, precision=engine.manifest.precision, machine=machine
    )
    encoder = load_encoder(engine, backend=backend, registry=registry, num_threads=num_cores)
    return beside_gpu(
        DecodeFigures(
            device=f"{torch.cuda.get_device_name()} ({machine.architecture})",
            num_images=len(images),
            mean_bytes=mean_bytes,
            timings=tuple(timings),
        ),
        config=config,
        images=images,
        geometries=found,
        pixels=pixels,
        decode=GpuDecoder(preprocessing, limits=ImageLimits(), num_threads=num_cores).decode,
        encode=encoder.encode_images,
    )


def beside_gpu(
    figures: DecodeFigures,
    *,
    config: DecodeConfig,
    images: Sequence[bytes],
    geometries: Sequence[Geometry | None],
    pixels: NDArray[np.uint8],
    decode: "Callable[[Jpegs], Decoded]",
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> DecodeFigures:
    """Add what a GPU does.

    Args:
        figures: Of the CPU cores.
        config: What is measured.
        images: Encoded.
        geometries: Of each that is for the GPU.
        pixels: uint8 [N, H, W, 3], RGB, HWC: of all images, by Pillow.
        decode: Decodes on the GPU.
        encode: Pixels -> embeddings [N, D] of unit norm.

    Raises:
        CatalogError: None is for the GPU.
        EngineError: The GPU rejects one that Pillow decodes.
        DeviceError: A call to it failed.
    """
    rows = [row for row, geometry in enumerate(geometries) if geometry is not None]
    suited = [geometry for geometry in geometries if geometry is not None]
    if not rows:
        raise CatalogError(f"catalog {config.catalog_uri}: no image is one that a GPU decodes")

    def first_jpegs(num_rows: int) -> Jpegs:
        chosen = [number % len(rows) for number in range(num_rows)]
        return jpegs_of(
            [images[rows[number]] for number in chosen],
            geometries=[suited[number] for number in chosen],
        )

    decoded = decode(first_jpegs(len(rows)))
    if decoded.rejected:
        raise EngineError(f"the GPU's decoder rejects images that Pillow decodes: {decoded}")
    timings = []
    for batch_rows in config.batch_sizes:
        batch = first_jpegs(batch_rows)
        decode(batch)
        seconds = _calls(partial(decode, batch), config=config)
        name = "nvJPEG and resize on the GPU"
        timings.append(_timing(name, seconds, batch_rows=batch_rows))
        # As the encode stage calls it.
        with ThreadPoolExecutor(CALLS_OF_GPU_ENCODER) as threads:
            many = partial(_all, threads, decode, [batch] * (4 * CALLS_OF_GPU_ENCODER))
            per_batch = [
                second / (4 * CALLS_OF_GPU_ENCODER) for second in _calls(many, config=config)
            ]
        name = f"the same, {CALLS_OF_GPU_ENCODER} calls at once"
        timings.append(_timing(name, per_batch, batch_rows=batch_rows))
    cosines = np.einsum(
        "nd,nd->n",
        encode(decoded.pixels.cpu().numpy()).astype(np.float64),
        encode(pixels[rows]),
    )
    return replace(
        figures,
        timings=(*figures.timings, *timings),
        num_by_cpu=len(images) - len(rows) + decoded.num_by_cpu,
        cosine_p1=float(np.percentile(cosines, 1)),
        cosine_min=float(cosines.min()),
    )


def decode_lines(figures: DecodeFigures) -> list[str]:
    """The figures as a table for a terminal."""
    lines = [
        f"{figures.num_images} images of {figures.mean_bytes:,.0f} bytes"
        f"{f' on {figures.device}' if figures.device else ', no GPU'}",
        f"{'':<36} {'batch':>6} {'images/s':>9} {'p50 ms':>9}",
    ]
    lines += [
        f"{timing.name:<36} {timing.batch_rows:>6,} {timing.images_per_second:>9,.0f} "
        f"{timing.p50_ms:>9,.2f}"
        for timing in figures.timings
    ]
    if figures.cosine_p1 is not None:
        lines.append(
            f"embeddings of the GPU's pixels to those of the CPU's: cosine {figures.cosine_p1:.5f} "
            f"at the 1st percentile, lowest {figures.cosine_min:.5f}; "
            f"{figures.num_by_cpu} images were left to a CPU"
        )
    return lines


def _by_pillow(encoded: Sequence[bytes], *, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    limits = ImageLimits()
    return np.stack(
        [decode_pixels(image, preprocessing=preprocessing, limits=limits) for image in encoded]
    )


def _geometries(encoded: Sequence[bytes]) -> list[Geometry | None]:
    limits = ImageLimits()
    return [gpu_geometry(image, limits=limits, max_aspect=MAX_ORDINARY_ASPECT) for image in encoded]


def _all(threads: ThreadPoolExecutor, call: Callable[[Any], Any], batches: list[Any]) -> None:
    list(threads.map(call, batches))


def _timing(name: str, seconds: Sequence[float], *, batch_rows: int) -> DecodeTiming:
    median = statistics.median(seconds)
    return DecodeTiming(
        name=name,
        batch_rows=batch_rows,
        num_calls=len(seconds),
        p50_ms=1e3 * median,
        images_per_second=batch_rows / median,
    )


def _calls(call: Callable[[], Any], *, config: DecodeConfig) -> list[float]:
    """Seconds of each of several calls."""
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < MIN_CALLS or (
        len(seconds) < MAX_CALLS and time.perf_counter() - began < config.seconds
    ):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds
