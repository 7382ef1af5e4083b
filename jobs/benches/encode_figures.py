"""What `clipmill bench encode` finds, and its table.

Knows nothing of how it is measured.
"""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One tower at one batch size."""

    modality: str
    """image or text."""
    batch_rows: int
    """Rows of a call."""
    num_calls: int
    """Timed."""
    p50_ms: float
    """Of a call, to host memory; from there, or see `pixels_on_gpu`."""
    p95_ms: float
    """95th percentile."""
    p99_ms: float
    """99th percentile."""
    rows_per_second: float
    """One call after the other, by the median."""
    stream_rows_per_second: float
    """Eight batches given at once."""
    tflops: float
    """Operations of the float32 model for these rows, in 10^12 a second, of the faster.

    All tokens of all blocks count, also those of the last that `torch` leaves out: 3 % of ViT-L/14,
    6 % of towers of 12 blocks.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderFigures:
    """One encoder."""

    name: str
    """Which."""
    load_seconds: float
    """From import to ready."""
    peak_memory_bytes: int
    """Of its process in host memory."""
    device_memory_bytes: int
    """Taken on a GPU."""
    cosine_mean: dict[str, float] = field(default_factory=dict)
    """By modality, to transformers in float32 on the same rows."""
    cosine_min: dict[str, float] = field(default_factory=dict)
    """Of the worst row."""
    timings: tuple[Timing, ...] = ()
    """By modality and batch size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeFigures:
    """All encoders, on one machine."""

    engine_id: str
    """The engine."""
    checkpoint: str
    """What all of them run."""
    device: str
    """The GPU, or the number of cores."""
    product_tflops: dict[str, float]
    """Rate of large matrix products here, measured, by number type."""
    product_type: str
    """That of the engine's products."""
    pixels_on_gpu: bool
    """Images of batches larger than a query are there before a call begins."""
    encoders: tuple[EncoderFigures, ...] = ()
    """As measured: first transformers in float32, then the engine."""


def timing_lines(encoder: EncoderFigures) -> list[str]:
    """What one encoder did, a line for each timing."""
    return [
        f"{encoder.name:<28} {timing.modality:<5} {timing.batch_rows:>6,} "
        f"{timing.rows_per_second:>9,.0f} {timing.stream_rows_per_second:>9,.0f} "
        f"{timing.p50_ms:>9,.2f} {timing.p95_ms:>9,.2f} {timing.p99_ms:>9,.2f} "
        f"{timing.tflops:>9.3g}"
        for timing in encoder.timings
    ]


def encode_lines(figures: EncodeFigures) -> list[str]:
    """The figures as a table for a terminal."""
    rates = ", ".join(f"{name} {rate:,.3g}" for name, rate in figures.product_tflops.items())
    lines = [
        f"engine {figures.engine_id} of {figures.checkpoint} on {figures.device}"
        f"{', pixels of large batches in its memory' if figures.pixels_on_gpu else ''}",
        f"large matrix products here: {rates} TFLOP/s",
        f"{'':<34} {'batch':>6} {'rows/s':>9} {'stream':>9} {'p50 ms':>9} {'p95':>9} {'p99':>9} "
        f"{'TFLOP/s':>9} {'of rate':>7}",
    ]
    rate = figures.product_tflops.get(figures.product_type, math.nan)
    lines += [
        f"{line} {timing.tflops / rate:>7.0%}"
        for encoder in figures.encoders
        for line, timing in zip(timing_lines(encoder), encoder.timings, strict=True)
    ]
    for encoder in figures.encoders:
        cosines = "; ".join(
            f"{name} cosine {encoder.cosine_mean[name]:.5f}, lowest {encoder.cosine_min[name]:.5f}"
            for name in encoder.cosine_mean
        )
        lines.append(
            f"{encoder.name}: {cosines}; ready in {encoder.load_seconds:.1f} s, host memory "
            f"{encoder.peak_memory_bytes / 2**20:,.0f} MiB, GPU memory "
            f"{encoder.device_memory_bytes / 2**20:,.0f} MiB"
        )
    return lines
