"""Nights in a process of their own, with a Ray that they share: for another environment than here.

Run as a script it answers each line of stdin (a JSON object of a method and its arguments) by one.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs import nightly
from jobs.cluster import ray_cluster
from tests.commands import Done, command
from tests.waiting import WAIT_SECONDS

ROOT = Path(__file__).resolve().parent.parent


class NightProcess:
    """Commands and changes of files, as that process sees them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def night(self, *words: object) -> Done:
        """`clipmill nightly`."""
        return Done(**self._ask("night", [str(word) for word in words]))

    def copy(self, source: Path, target: Path) -> None:
        """Copy a folder, into one that may be there."""
        self._ask("copy", [str(source), str(target)])

    def fill(self, folder: Path, *, num_left: int) -> None:
        """Fill the disk that a folder is on, but for so many bytes; what filled it before goes."""
        self._ask("fill", [str(folder), num_left])

    def _ask(self, method: str, arguments: Sequence[Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([method, arguments]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line)


@contextmanager
def night_process(
    *, before: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[NightProcess]:
    """A process for nights.

    Args:
        before: What it is started by.
        environment: Variables that it has besides those of this one.
    """
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "tests.night_process"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield NightProcess(process)
    finally:
        process.stdin.close()
        process.wait(timeout=WAIT_SECONDS)
        process.stdout.close()


def _night(*words: str) -> dict[str, Any]:
    return dataclasses.asdict(command(nightly.main, words))


def _copy(source: str, target: str) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def _fill(folder: str, num_left: int) -> None:
    ballast = Path(folder) / ".ballast"
    ballast.unlink(missing_ok=True)
    free = os.statvfs(folder)
    num_bytes = free.f_bavail * free.f_frsize - num_left
    assert num_bytes > 0
    ballast.write_bytes(bytes(num_bytes))


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints to stdout as it starts
    nightly.ray_cluster = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment]
    methods: dict[str, Any] = {"night": _night, "copy": _copy, "fill": _fill}
    with ray_cluster(None):
        for line in sys.stdin:
            method, arguments = json.loads(line)
            answers.write(json.dumps(methods[method](*arguments)) + "\n")
            answers.flush()


if __name__ == "__main__":
    _serve()
