"""Kills in this process, at any of the operations by which a store changes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.publishing.folders import Folder
from pipelines import rounds
from pipelines.snapshots import StoredFile


class Killed(BaseException):
    """In place of a signal: nothing handles it."""


class Interruption:
    """Kills this process, so to speak, at one of the operations by which a store changes.

    From then on it does nothing more: what tidies up after an error does not after a kill.
    """

    def __init__(self, number: int, is_done: bool) -> None:
        """Before the operation of this number, or right after it, if it is done."""
        self._left, self._is_done, self._is_dead = number, is_done, False

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        for name in ("publish", "create", "remove", "_remove_file"):
            self._patch.setattr(Folder, name, self._wrapped(getattr(Folder, name)))
        self._patch.setattr(rounds, "run_stages", self._watched(rounds.run_stages))

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _wrapped(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def interrupted(*args: Any, **options: Any) -> Any:
            is_due = self._count()
            if is_due and self._is_done:
                operation(*args, **options)
            if is_due:
                raise Killed
            return operation(*args, **options)

        return interrupted

    def _watched(self, stages: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Iterator[list[StoredFile]]:
            for files in stages(*args, **options):
                if self._count():
                    raise Killed
                yield files

        return watched

    def _count(self) -> bool:
        if self._is_dead:
            raise Killed
        self._left -= 1
        self._is_dead = self._left < 0
        return self._is_dead
