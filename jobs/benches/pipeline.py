"""Measures `clipmill embed` as a whole: rows a second and memory, over sizes of catalogs.

Knows nothing of how to make it faster.
"""

import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.errors import ClipmillError
from jobs.benches.programs import run_watched
from jobs.benches.repeated_images import RepeatedImages, write_images
from jobs.demo.catalog import sample_rows, write_catalog
from pipelines.engines import EngineChoice

CATALOG, STORE, OUT = "catalog", "store", "out"
OUTPUTS = (STORE, OUT)
CLIPMILL, BASELINE = "clipmill", "Ray Data, Pillow, transformers"
NUM_SCENES = 1_000  # distinct ones; beyond, they come again under other keys

OnRun = Callable[[str], None]


def _unheard(line: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """What is measured."""

    num_rows: int
    """Of the catalog."""
    engine: EngineChoice
    """What embeds it."""
    images: RepeatedImages | None = None
    """What the catalog is made of; None: drawn scenes with captions."""
    num_runs: int = 1
    """Of which the one in the middle counts, each into a new store."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_runs < 1 or self.num_runs % 2 == 0:
            raise ValueError(f"num_runs={self.num_runs}: expected an odd number of at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFigures:
    """One size of catalog, by one program: the run that took the median time."""

    name: str
    """Clipmill, or what it is compared with."""
    num_rows: int
    """Rows, each an image, and a text where scenes are drawn."""
    seconds: float
    """The whole command, Ray's start included."""
    all_seconds: tuple[float, ...]
    """The same of every run, ascending."""
    rows_per_second: float
    """Images and texts in a second, from the first read to the last write."""
    steady_rows_per_second: float
    """The same from the first second (or, of what Clipmill is compared with, batch) with encoded
    rows on: without the start of workers and models; 0 where there was no other. The median of
    all runs."""
    all_steady: tuple[float, ...]
    """The same of every run, ascending."""
    peak_memory_bytes: int
    """Of all processes together: proportional set size, so that shared pages count once."""
    spilled_bytes: int | None = None
    """See `RunReport`; None for what Clipmill is compared with."""
    rejects_by_reason: dict[str, int] = field(default_factory=dict)
    """Damaged rows; every other one was embedded."""
    bottleneck: str = ""
    """What limited, and what would help."""


def measure_pipeline(config: PipelineConfig, *, on_run: OnRun = _unheard) -> PipelineFigures:
    """Time `clipmill embed`; says what each run took as it ends.

    Raises:
        ClipmillError: It failed, or a key is in neither embeddings nor rejects.
    """
    engine = config.engine
    words = ["-m", "jobs.cli", "embed", "--json", "--engines", engine.engines_uri]
    words += ["--backend", engine.backend, "--decode", engine.decoder]
    words += ["--engine", engine.engine_id] if engine.engine_id else []
    words += ["--checkpoint", engine.checkpoint] if engine.checkpoint else []
    figures, report = _measured(
        CLIPMILL,
        config=config,
        command=lambda folder: [
            *(*words, "--catalog", str(folder / CATALOG), "--store", str(folder / STORE)),
        ],
        num_contents=lambda report: sum(report["num_embedded"].values()),
        on_run=on_run,
    )
    accounted = sum(report["num_stored"].values()) + sum(report["rejects_by_reason"].values())
    if accounted != config.num_rows * len(report["num_stored"]):
        raise ClipmillError(f"{accounted} embeddings and rejects of {config.num_rows} rows")
    return replace(
        figures,
        spilled_bytes=report["spilled_bytes"],
        rejects_by_reason=report["rejects_by_reason"],
        bottleneck=report["bottleneck"],
    )


def measure_baseline(config: PipelineConfig, *, on_run: OnRun = _unheard) -> PipelineFigures:
    """Time Ray Data with Pillow and transformers on the same catalog; it takes no damaged images.

    Raises:
        ClipmillError: It failed.
    """
    checkpoint = config.engine.checkpoint
    if checkpoint is None:
        raise ClipmillError("the baseline loads a checkpoint: name it, not an engine")
    figures, report = _measured(
        BASELINE,
        config=config,
        command=lambda folder: [
            *("-m", "jobs.benches.ray_baseline", checkpoint),
            *(str(folder / CATALOG), str(folder / OUT)),
        ],
        num_contents=_num_encoded,
        on_run=on_run,
    )
    num_encoded = _num_encoded(report)
    num_wanted = config.num_rows * (1 if config.images else 2)  # scenes have a text each
    if num_encoded != num_wanted:
        raise ClipmillError(f"{figures.name} embedded {num_encoded} of {num_wanted} contents")
    return figures


def pipeline_lines(figures: Sequence[PipelineFigures]) -> list[str]:
    """A table for people, the range of several runs, how two programs compare, what limits."""
    lines = [
        f"{'':<30} {'rows':>9} {'seconds':>9} {'embedded/s':>11} {'steady':>9} "
        f"{'peak memory MiB':>16}"
    ]
    lines += [
        f"{figure.name:<30} {figure.num_rows:>9,} {figure.seconds:>9.1f} "
        f"{figure.rows_per_second:>11,.0f} {figure.steady_rows_per_second:>9,.0f} "
        f"{figure.peak_memory_bytes / 2**20:>16,.0f}"
        for figure in figures
    ]
    lines += [
        f"{figure.name}, {figure.num_rows:,} rows: {len(figure.all_seconds)} runs took "
        f"{figure.all_seconds[0]:.1f} to {figure.all_seconds[-1]:.1f} s, steady "
        f"{figure.all_steady[0]:,.0f} to {figure.all_steady[-1]:,.0f}"
        for figure in figures
        if len(figure.all_seconds) > 1
    ]
    for ours, other in pairwise(figures):
        if ours.num_rows == other.num_rows and (ours.name, other.name) == (CLIPMILL, BASELINE):
            lines.append(
                f"{ours.name} embeds {ours.rows_per_second / other.rows_per_second:.1f} x as many "
                f"a second as {other.name}, of {ours.num_rows:,} rows{_steady_ratio(ours, other)}"
            )
    return [*lines, *(figure.bottleneck for figure in figures if figure.bottleneck)]


def _steady_ratio(ours: PipelineFigures, other: PipelineFigures) -> str:
    if not (ours.steady_rows_per_second and other.steady_rows_per_second):
        return ""
    return f"; steady, {ours.steady_rows_per_second / other.steady_rows_per_second:.1f} x"


def _measured(
    name: str,
    *,
    config: PipelineConfig,
    command: Callable[[Path], list[str]],
    num_contents: Callable[[dict[str, Any]], int],
    on_run: OnRun,
) -> tuple[PipelineFigures, dict[str, Any]]:
    """Run a program over a catalog made for it, as often as is asked for."""
    folder = Path(tempfile.mkdtemp(prefix="clipmill-bench-"))
    num_rows = config.num_rows
    try:
        if config.images is None:
            drawn = sample_rows(min(num_rows, NUM_SCENES))
            rows = [replace(drawn[row % len(drawn)], key=f"{row:09d}") for row in range(num_rows)]
            write_catalog(folder / CATALOG, rows)
        else:
            write_images(folder / CATALOG, config.images, num_rows=num_rows)
        runs = []
        for number in range(config.num_runs):
            run = run_watched(command(folder))
            runs.append(run)
            on_run(
                f"{name}, {num_rows:,} rows, run {number + 1} of {config.num_runs}: "
                f"{run.seconds:.1f} s, {num_contents(run.report) / run.report['seconds']:,.0f}/s, "
                f"steady {_steady_rate(run.report):,.0f}/s"
            )
            for output in OUTPUTS:
                shutil.rmtree(folder / output, ignore_errors=True)
    finally:
        shutil.rmtree(folder)
    median = sorted(runs, key=lambda run: run.seconds)[config.num_runs // 2]
    all_steady = sorted(_steady_rate(run.report) for run in runs)
    figures = PipelineFigures(
        name=name,
        num_rows=num_rows,
        seconds=median.seconds,
        all_seconds=tuple(sorted(run.seconds for run in runs)),
        rows_per_second=num_contents(median.report) / median.report["seconds"],
        steady_rows_per_second=statistics.median(all_steady),
        all_steady=tuple(all_steady),
        peak_memory_bytes=median.peak_memory_bytes,
    )
    return figures, median.report


def _num_encoded(report: Mapping[str, Any]) -> int:
    """Images and texts, by the last sample."""
    num_contents: int = report["samples"][-1][1]
    return num_contents


def _steady_rate(report: Mapping[str, Any]) -> float:
    """Rows a second after the first sample with any, to the last with new ones."""
    samples: Sequence[tuple[float, int]] = report.get("samples", [])
    busy = [sample for sample in samples if sample[1]]
    if not busy:
        return 0.0
    ended = next(sample for sample in busy if sample[1] == busy[-1][1])
    seconds = ended[0] - busy[0][0]
    return (ended[1] - busy[0][1]) / seconds if seconds else 0.0
