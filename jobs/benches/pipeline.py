"""Measures `clipmill embed` as a whole: rows a second and memory, over sizes of catalogs.

Knows nothing of how to make it faster.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import ClipmillError
from jobs.benches.memory import MemoryWatch
from jobs.demo.catalog import sample_rows, write_catalog

NUM_SCENES = 1_000  # distinct ones; beyond, they come again under other keys


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFigures:
    """One size of catalog."""

    num_rows: int
    """Rows, each an image and a text."""
    seconds: float
    """The whole command, Ray's start included."""
    rows_per_second: float
    """Images and texts encoded in a second of the stages' time."""
    peak_memory_bytes: int
    """Of all processes together: proportional set size, so that shared pages count once."""


def measure_pipeline(num_rows: int, *, checkpoint: str) -> PipelineFigures:
    """Embed a sample catalog in a process of its own, watching the memory of all its children."""
    folder = Path(tempfile.mkdtemp(prefix="clipmill-bench-"))
    try:
        drawn = sample_rows(min(num_rows, NUM_SCENES))
        rows = [replace(drawn[row % len(drawn)], key=f"{row:09d}") for row in range(num_rows)]
        write_catalog(folder / "catalog", rows)
        command = [sys.executable, "-m", "jobs.cli", "embed", "--json", "--checkpoint", checkpoint]
        command += ["--catalog", str(folder / "catalog"), "--store", str(folder / "store")]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        with MemoryWatch(process.pid) as watch:
            output, _ = process.communicate()
        seconds = time.perf_counter() - started
        if process.returncode:
            raise ClipmillError(f"{' '.join(command)} ended with {process.returncode}")
        report = json.loads(output)
    finally:
        shutil.rmtree(folder)
    return PipelineFigures(
        num_rows=num_rows,
        seconds=seconds,
        rows_per_second=sum(report["num_embedded"].values()) / report["seconds"],
        peak_memory_bytes=watch.peak_bytes,
    )
