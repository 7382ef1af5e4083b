"""Counts the rows that workers of a cluster begin to encode, and on which nodes, and holds them."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

LOG = "CLIPMILL_TEST_ENCODED_ROWS"
MODULE = "pipelines.encode"


def environment(log: Path) -> dict[str, str]:
    """Variables for a cluster's processes: each worker calls `note_rows` as it starts."""
    return {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.{note_rows.__name__}", LOG: str(log)}


def note_rows() -> None:
    """From here on, each batch that this process begins to encode adds a line to the log."""
    sys.meta_path.insert(0, _NotingFinder())


class _NotingFinder(importlib.abc.MetaPathFinder):
    """Finds the encode stage when a worker imports it; most never do, and it takes a second."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_note(module: ModuleType) -> None:
            load(module)
            _note(module.EncodeStage)

        spec.loader.exec_module = load_and_note  # type: ignore[method-assign]
        return spec


def _note(stage: Any) -> None:
    encode = stage.__call__

    def noted(self: Any, table: Any) -> Any:
        with open(os.environ[LOG], "a") as log:
            log.write(f"{table.num_rows} {os.getppid()}\n")  # that started this worker: its raylet
        while _is_held(Path(os.environ[LOG])):
            time.sleep(0.05)
        return encode(self, table)

    stage.__call__ = noted


@contextmanager
def held(log: Path, *, after_rows: int) -> Iterator[None]:
    """Once more rows than that are begun, no batch that is begun goes on before the block ends."""
    allowed = rows_by_raylet(log).total() + after_rows
    _hold(log).write_text(str(allowed))
    try:
        yield
    finally:
        _hold(log).unlink()


def _is_held(log: Path) -> bool:
    try:
        return rows_by_raylet(log).total() > int(_hold(log).read_text())
    except FileNotFoundError:
        return False


def _hold(log: Path) -> Path:
    return log.with_name(f"{log.name}.held")


@contextmanager
def counted(log: Path) -> Iterator[list[int]]:
    """Rows of each batch that is begun in a block; complete when it ends."""
    before = len(log.read_text()) if log.exists() else 0
    batches: list[int] = []
    yield batches
    if log.exists():
        batches += [num_rows for num_rows, _ in _batches(log.read_text()[before:])]


def rows_by_raylet(log: Path) -> Counter[int]:
    """Process id of a node's raylet -> rows that its workers began."""
    found: Counter[int] = Counter()
    for num_rows, raylet_pid in _batches(log.read_text() if log.exists() else ""):
        found[raylet_pid] += num_rows
    return found


def _batches(text: str) -> Iterator[tuple[int, int]]:
    for line in text.splitlines():
        num_rows, raylet_pid = map(int, line.split())
        yield num_rows, raylet_pid
