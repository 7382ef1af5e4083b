"""Runs a program of this project in a process of its own, and watches all its children.

Knows nothing of what it does or of what its report says.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.errors import ClipmillError
from jobs.benches.memory import MemoryWatch
from jobs.stopping import Terminated, ended_by_sigterm

# A run that is told to end stops its Ray first.
STOP_SECONDS = 60.0


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
    """Run `PYTHON WORDS` to its end, or to that of the caller; ClipmillError if it fails."""
    command = [python, *words]
    started = time.perf_counter()
    with (
        ended_by_sigterm(),  # or the program would go on
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
    ):
        try:
            with MemoryWatch(process.pid) as watch:
                output, _ = process.communicate()
        except KeyboardInterrupt as error:
            if not isinstance(error, Terminated):  # Ctrl-C came to the program as well
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            raise
        finally:
            if process.poll() is None:
                end(process)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise ClipmillError(f"{' '.join(command)} ended with {process.returncode}")
    return Watched(report=json.loads(output), seconds=seconds, peak_memory_bytes=watch.peak_bytes)


def end(process: subprocess.Popen[Any]) -> None:
    """Tell a program to end, and wait until it has; killed, if it does not."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
