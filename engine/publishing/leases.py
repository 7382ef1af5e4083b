"""Leases on an object store: of all nodes that want to build the same thing, one does.

Knows nothing of what is built.

A lease is a numbered file. Whoever creates the next number holds it, and writes a new beat into it
every few seconds. One who waits, and sees the last lease unchanged for long enough by its own
clock, creates the next number; the clocks of two nodes are never compared.

A lease saves work and no more: a holder that was paused wakes up and goes on beside the next one.
That both may finish, and only one's work counts, is the publication's affair
(`engine/publishing/remote.py`).
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from engine.errors import EngineError
from engine.publishing.folders import Folder

LEASES_DIR = "leases"


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseTiming:
    """How often a holder shows that it lives, and how long others wait for that."""

    beat_seconds: float = 5.0
    """Between two beats; also how often a waiter looks."""
    expiry_seconds: float = 60.0
    """Without a beat, after which a lease is free. Exporting a large graph holds the interpreter,
    and with it the beat, for many seconds."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.beat_seconds <= 0:
            raise ValueError(f"beat_seconds={self.beat_seconds}: expected more than 0")
        if self.expiry_seconds < 2 * self.beat_seconds:
            raise ValueError(
                f"expiry_seconds={self.expiry_seconds}: expected at least two beats of "
                f"{self.beat_seconds}"
            )


class Lease:
    """A lease that this process holds; renewed by a thread for the length of a `with` block."""

    def __init__(self, root: Folder, path: str, *, holder: str, timing: LeaseTiming) -> None:
        """Name a lease that `holder` has just created."""
        self._root = root
        self._path = path
        self._holder = holder
        self._timing = timing
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {path}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(EngineError):  # out of reach: the lease runs out by itself
            self._root.publish(self._path, self._state(beat=0, is_released=True))

    def _beat(self) -> None:
        beat = 1
        while not self._ended.wait(self._timing.beat_seconds):
            # A beat that fails costs at most a second build; a root that stays out of reach is
            # what the publication reports.
            with suppress(EngineError):
                self._root.publish(self._path, self._state(beat=beat, is_released=False))
            beat += 1

    def _state(self, *, beat: int, is_released: bool) -> bytes:
        return _state(self._holder, beat=beat, is_released=is_released)


class LeaseQueue:
    """One who wants the lease on something, and watches the one who has it."""

    def __init__(self, root: Folder, name: str, *, timing: LeaseTiming) -> None:
        """Nothing is read or written yet.

        Args:
            root: Where all nodes keep the leases.
            name: Of what is to be built.
            timing: How long to wait for the holder.
        """
        self._root = root
        self._folder = f"{LEASES_DIR}/{name}"
        self._timing = timing
        self._seen: tuple[str, bytes] | None = None
        self._seen_seconds = 0.0

    def take(self) -> Lease | None:
        """The lease, if nobody has it or its holder shows no life; else None, ask again later.

        Raises:
            EngineError: The root cannot be read or written.
        """
        leases = self._root.list(self._folder, suffix=".json")
        if leases and self._is_held(leases[-1]):
            return None
        number = int(leases[-1].rsplit("/", 1)[-1].removesuffix(".json")) if leases else 0
        path = f"{self._folder}/{number + 1:08d}.json"
        # For people, where to look; and by lot, since no two may create a lease of one content.
        holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        try:
            self._root.create(path, _state(holder, beat=0, is_released=False))
        except FileExistsError:
            return None
        return Lease(self._root, path, holder=holder, timing=self._timing)

    def _is_held(self, path: str) -> bool:
        state = self._root.read(path)
        if is_released(state):
            return False
        now = time.monotonic()
        if self._seen != (path, state):
            self._seen, self._seen_seconds = (path, state), now
        return now - self._seen_seconds < self._timing.expiry_seconds


def _state(holder: str, *, beat: int, is_released: bool) -> bytes:
    return json.dumps({"holder": holder, "beat": beat, "is_released": is_released}).encode()


def is_released(state: bytes) -> bool:
    """Whether the content of a lease says that its holder is done with it."""
    return bool(json.loads(state)["is_released"])
