"""Does what workers died of in a process of its own, row by row, and finds the rows it dies of.

Knows nothing of stages, of Ray, or of why the workers died.

Not by halves: a process that takes the rows one by one dies once for each guilty row, a search by
halves as often as there are halvings, and what takes the time is to start it (an engine is loaded
each time). A row is only blamed if two processes died of it that had no other before: one may have
been ended from outside.
"""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import psutil
import pyarrow as pa
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from pipelines.errors import WorkerDeathError
from pipelines.isolated_process import DONE, LOST, StageFunction, packed, unpacked

MAX_STARTS = 3
# Of a row, before it is blamed.
FRESH_DEATHS = 2
# Each by itself, and none between them that it survived.
MAX_POISON_IN_A_ROW = 8
# Of the free memory, for one call: with more, Ray or the kernel would end a process, maybe another.
MEMORY_SHARE = 0.5
MEMORY_POLL_SECONDS = 0.05
END_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Isolated:
    """What became of a table's rows."""

    parts: list[pa.Table]
    """What the stage made of those that it survived."""
    poison: dict[int, str]
    """Row of the table -> what it did to a process that had no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Death:
    cause: str
    was_fresh: bool
    """Whether it died of the first that it was given."""


class IsolatedStage:
    """A stage in a process of its own, which is started when it is needed. Use as a context."""

    def __init__(self, load: Callable[[], StageFunction], *, called: str) -> None:
        """Nothing is started yet.

        Args:
            load: Called there, gives the stage; pickled.
            called: The stage, for messages.
        """
        self._load = load
        self._called = called
        self._process: _Process | None = None
        self._num_in_a_row = 0

    def __enter__(self) -> Self:
        """Nothing to do; the process comes with the calls."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()

    def __call__(self, table: pa.Table) -> Isolated:
        """Do a table: as it is, or row by row if that is the end of the process.

        Raises:
            WorkerDeathError: The process cannot be started, or dies of one row after the other.
        """
        whole = self._tried(table)
        if isinstance(whole, pa.Table):
            self._num_in_a_row = 0
            return Isolated(parts=[whole], poison={})
        parts, poison = [], {}
        for row in range(table.num_rows):
            done = self._alone(table.slice(row, 1))
            if isinstance(done, _Death):
                poison[row] = done.cause
                self._count_poison(done.cause)
            else:
                parts.append(done)
                self._num_in_a_row = 0
        return Isolated(parts=parts, poison=poison)

    def close(self) -> None:
        """End the process, if there is one; the next call starts another."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _alone(self, row: pa.Table) -> pa.Table | _Death:
        """What became of a row; a death is its own fault."""
        num_fresh_deaths = 0
        while True:
            done = self._tried(row)
            if isinstance(done, pa.Table):
                return done
            num_fresh_deaths += done.was_fresh
            if num_fresh_deaths == FRESH_DEATHS:
                return done

    def _tried(self, table: pa.Table) -> pa.Table | _Death:
        process = self._process = self._process or self._started()
        try:
            answer = process.ask(packed(table))
        except BaseException:
            self.close()
            raise
        if isinstance(answer, _Death):
            self.close()
            return answer
        return unpacked(answer)

    def _started(self) -> "_Process":
        cause = ""
        for _ in range(MAX_STARTS):
            process = _Process()
            try:
                answer = process.ask(pickle.dumps(self._load))
            except BaseException:
                process.end()
                raise
            if not isinstance(answer, _Death):
                process.is_fresh = True
                return process
            process.end()
            cause = answer.cause
        raise WorkerDeathError(
            f"{self._called} cannot be started: its process {cause}, and so did {MAX_STARTS - 1} "
            "before it. What was written is kept; see why in the logs of Ray, then run the same "
            "command again"
        )

    def _count_poison(self, cause: str) -> None:
        self._num_in_a_row += 1
        if self._num_in_a_row >= MAX_POISON_IN_A_ROW:
            raise WorkerDeathError(
                f"{self._called} died of {self._num_in_a_row} rows one after the other, each by "
                f"itself (its process {cause}): it is hardly the rows. What was written is kept; "
                "see why in the logs of Ray, then run the same command again"
            )


class _Process:
    """One process, and what it is asked."""

    def __init__(self) -> None:
        here, there = multiprocessing.Pipe()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.isolated_process", str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                # As a worker of Ray found the packages, in whatever folder it works.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
        self._pipe: Connection = here
        self.is_fresh = True

    def ask(self, content: bytes | memoryview) -> memoryview | _Death:
        """Its answer, or how it died; raises what it raised."""
        was_fresh, self.is_fresh = self.is_fresh, False
        limit = self._memory() + MEMORY_SHARE * (get_system_memory() - get_used_memory())
        try:
            self._pipe.send_bytes(content)
            while not self._pipe.poll(MEMORY_POLL_SECONDS):
                if (taken := self._memory()) > limit:
                    self.end()
                    cause = f"took {taken / 2**20:,.0f} MiB of memory, with too little left"
                    return _Death(cause=cause, was_fresh=was_fresh)
            answer = memoryview(self._pipe.recv_bytes())
        except (EOFError, ConnectionError):
            return _Death(cause=self._how_it_ended(), was_fresh=was_fresh)
        if answer[:1] == DONE:
            return answer[1:]
        if answer[:1] == LOST:
            return _Death(cause=f"lost the GPU: {bytes(answer[1:]).decode()}", was_fresh=was_fresh)
        raise pickle.loads(answer[1:])

    def end(self) -> None:
        """Kill it; it has nothing to lose."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def _memory(self) -> int:
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return 0

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "answers no more"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
