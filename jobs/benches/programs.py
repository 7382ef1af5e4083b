"""Runs a program of this project in a process of its own, and watches all its children.

Knows nothing of what it does or of what its report says.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ClipmillError
from jobs.benches.memory import MemoryWatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A program that has ended."""

    report: Any
    """What it printed, JSON."""
    seconds: float
    """The whole command, Ray's start included."""
    peak_memory_bytes: int
    """Of all processes together: proportional set size, so that shared pages count once."""


def run_watched(words: Sequence[str], *, python: str = sys.executable) -> Watched:
    """Run `PYTHON WORDS` to its end; ClipmillError if it fails."""
    command = [python, *words]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    with MemoryWatch(process.pid) as watch:
        output, _ = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise ClipmillError(f"{' '.join(command)} ended with {process.returncode}")
    return Watched(report=json.loads(output), seconds=seconds, peak_memory_bytes=watch.peak_bytes)
