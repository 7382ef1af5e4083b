"""Measures `clipmill embed` as a whole: rows a second and memory, over sizes of catalogs.

Knows nothing of how to make it faster.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import ClipmillError
from jobs.benches.memory import MemoryWatch
from jobs.demo.catalog import sample_rows, write_catalog

NUM_SCENES = 1_000  # distinct ones; beyond, they come again under other keys


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFigures:
    """One size of catalog, by one program."""

    name: str
    """Clipmill, or what it is compared with."""
    num_rows: int
    """Rows, each an image and a text."""
    seconds: float
    """The whole command, Ray's start included."""
    rows_per_second: float
    """Images and texts in a second, from the first read to the last write."""
    peak_memory_bytes: int
    """Of all processes together: proportional set size, so that shared pages count once."""


def measure_pipeline(num_rows: int, *, checkpoint: str) -> PipelineFigures:
    """Time `clipmill embed` on a sample catalog.

    Args:
        num_rows: Of the catalog.
        checkpoint: Hub id or folder.

    Raises:
        ClipmillError: It failed.
    """
    return _measured(
        "clipmill",
        num_rows=num_rows,
        command=lambda folder: [
            *("-m", "jobs.cli", "embed", "--json", "--checkpoint", checkpoint),
            *("--catalog", str(folder / "catalog"), "--store", str(folder / "store")),
        ],
    )


def measure_baseline(num_rows: int, *, checkpoint: str) -> PipelineFigures:
    """Time Ray Data with Pillow and transformers on the same catalog; see `measure_pipeline`."""
    return _measured(
        "Ray Data, Pillow, transformers",
        num_rows=num_rows,
        command=lambda folder: [
            *("-m", "jobs.benches.ray_baseline", checkpoint),
            *(str(folder / "catalog"), str(folder / "out")),
        ],
    )


def _measured(name: str, *, num_rows: int, command: Callable[[Path], list[str]]) -> PipelineFigures:
    """Run a program of this project in a process of its own, and watch all its children."""
    folder = Path(tempfile.mkdtemp(prefix="clipmill-bench-"))
    try:
        drawn = sample_rows(min(num_rows, NUM_SCENES))
        rows = [replace(drawn[row % len(drawn)], key=f"{row:09d}") for row in range(num_rows)]
        write_catalog(folder / "catalog", rows)
        words = [sys.executable, *command(folder)]
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        with MemoryWatch(process.pid) as watch:
            output, _ = process.communicate()
        seconds = time.perf_counter() - started
        if process.returncode:
            raise ClipmillError(f"{' '.join(words)} ended with {process.returncode}")
        inner_seconds = json.loads(output)["seconds"]
    finally:
        shutil.rmtree(folder)
    return PipelineFigures(
        name=name,
        num_rows=num_rows,
        seconds=seconds,
        rows_per_second=2 * num_rows / inner_seconds,
        peak_memory_bytes=watch.peak_bytes,
    )
