"""Does what workers died of in a process of its own, row by row, and finds the rows it dies of.

Knows nothing of stages, of Ray, or of why the workers died.

Not by halves: a process that takes the rows one by one dies once for each guilty row, a search by
halves as often as there are halvings, and what takes the time is to start it (an engine is loaded
each time). A row is only blamed if two processes died of it that had no other before: one may have
been ended from outside. Of signals that come from there, as the kernel's where memory is short, it
takes four. And each process first does control rows, which are harmless: where it dies of them too,
no row is at fault.
"""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import psutil
import pyarrow as pa

from pipelines.arrow_files import read_stream
from pipelines.errors import WorkerDeathError
from pipelines.resilience.isolated_process import DONE, LOST, StageFunction, packed

MAX_STARTS = 3
# Of a row, before it is blamed.
FRESH_DEATHS = 2
# The same, of deaths that may have come from outside: memory is rarely short so often in a row.
FRESH_KILLS = 4
# Each by itself, and none between them that it survived.
MAX_POISON_IN_A_ROW = 8
POLL_SECONDS = 0.05
END_SECONDS = 10.0
# What ends a process where memory is short (the kernel, earlyoom), or a person; no library does.
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM})

_WAY_OUT = (
    "What was written is kept; see why in the logs of Ray and the machine's messages (dmesg), then "
    "run the same command again"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Isolated:
    """What became of a table's rows."""

    parts: list[pa.Table]
    """What the stage made of those that it survived, in order: of all at once, or of each."""
    poison: dict[int, str]
    """Row of the table, ascending -> what it did to a process that had no other."""

    def joined(self, rejects: pa.Table | None) -> pa.Table:
        """All rows in the order of the table.

        Args:
            rejects: Those in `poison`, in order; None if there are none.
        """
        if rejects is None:
            return pa.concat_tables(self.parts)
        parts = iter(self.parts)
        places = {row: place for place, row in enumerate(self.poison)}
        return pa.concat_tables(
            rejects.slice(places[row], 1) if row in places else next(parts)
            for row in range(len(self.parts) + len(places))
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Death:
    cause: str
    was_killed: bool = False
    """From outside (`_FROM_OUTSIDE`)."""
    was_fresh: bool = False
    """Whether it died of the first row or rows that it was given."""


class IsolatedStage:
    """A stage in a process of its own, which is started when it is needed. Use as a context."""

    def __init__(
        self,
        load: Callable[[], StageFunction],
        *,
        control: Callable[[pa.Schema], pa.Table],
        max_bytes: int,
        called: str,
    ) -> None:
        """Nothing is started yet.

        Args:
            load: Called there, gives the stage; pickled.
            control: Gives harmless rows for the stage, of the schema of those it is to do.
            max_bytes: Of memory that a call may add to what the process has. The same on a machine
                at any time: what a row is must not hang on what else is running.
            called: The stage, for messages.
        """
        self._load = load
        self._control = control
        self._max_bytes = max_bytes
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
            WorkerDeathError: The process cannot be started, or dies of control rows, or of one row
                after the other.
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
        num_deaths = num_kills = 0
        while True:
            done = self._tried(row)
            if isinstance(done, pa.Table):
                return done
            num_kills += done.was_fresh and done.was_killed
            num_deaths += done.was_fresh and not done.was_killed
            if num_deaths == FRESH_DEATHS or num_kills == FRESH_KILLS:
                return done

    def _tried(self, table: pa.Table) -> pa.Table | _Death:
        process = self._process = self._process or self._started(table.schema)
        was_fresh, process.is_fresh = process.is_fresh, False
        with ExitStack() as unless_done:
            unless_done.callback(self.close)
            answer = process.ask(packed(table), max_bytes=self._max_bytes)
            if isinstance(answer, _Death):
                return replace(answer, was_fresh=was_fresh)
            unless_done.pop_all()
        return read_stream(answer)

    def _started(self, schema: pa.Schema) -> "_Process":
        """A process that has loaded the stage and survived control rows."""
        for _ in range(MAX_STARTS):
            process = _Process()
            with ExitStack() as unless_done:
                unless_done.callback(process.end)
                fault = "cannot be started"
                answer = process.ask(pickle.dumps(self._load), max_bytes=None)
                if not isinstance(answer, _Death):
                    fault = "does not survive rows that are harmless"
                    control = self._control(schema)
                    # Each alone, as what is suspected will be.
                    for row in range(control.num_rows):
                        answer = process.ask(packed(control.slice(row, 1)), max_bytes=None)
                        if isinstance(answer, _Death):
                            break
                if not isinstance(answer, _Death):
                    unless_done.pop_all()
                    return process
                cause = answer.cause
        raise WorkerDeathError(
            f"{self._called} {fault}: its process {cause}, and {MAX_STARTS - 1} before it ended "
            "too. It is not the rows but this machine, its GPU, a library or the engine. "
            f"{_WAY_OUT}"
        )

    def _count_poison(self, cause: str) -> None:
        self._num_in_a_row += 1
        if self._num_in_a_row >= MAX_POISON_IN_A_ROW:
            raise WorkerDeathError(
                f"{self._called} died of {self._num_in_a_row} rows one after the other, each by "
                f"itself (its process {cause}), and survived others that are harmless: a library "
                f"or the engine is hardly made for rows like these. {_WAY_OUT}"
            )


class _Process:
    """One process, and what it is asked."""

    def __init__(self) -> None:
        here, there = multiprocessing.Pipe()
        with there:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pipelines.resilience.isolated_process",
                    str(there.fileno()),
                ],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                # As a worker of Ray found the packages, in whatever folder it works.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
        self._pipe: Connection = here
        self.is_fresh = True
        """Whether it had no row yet but control rows."""

    def ask(self, content: bytes | memoryview, *, max_bytes: int | None) -> memoryview | _Death:
        """Its answer, or how it died; raises what it raised.

        Args:
            content: What it gets.
            max_bytes: Of memory that it may take more than it has; None: all there is.
        """
        before = self._memory()
        try:
            self._pipe.send_bytes(content)
            while not self._pipe.poll(POLL_SECONDS):
                taken = self._memory() - before
                if max_bytes is not None and taken > max_bytes:
                    self.end()
                    return _Death(
                        cause=f"took {taken / 2**20:,.0f} MiB of memory, above "
                        f"{max_bytes / 2**20:,.0f}"
                    )
            answer = memoryview(self._pipe.recv_bytes())
        except (EOFError, OSError):  # plain, if it dies in the midst of its answer
            return self._how_it_ended()
        if answer[:1] == DONE:
            return answer[1:]
        if answer[:1] == LOST:
            return _Death(cause=f"lost the GPU: {bytes(answer[1:]).decode()}")
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

    def _how_it_ended(self) -> _Death:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return _Death(cause="answers no more")
        if code >= 0:
            return _Death(cause=f"ended with {code}")
        names = [known.name for known in signal.Signals if known == -code]
        return _Death(
            cause=f"was killed by {''.join(names) or f'signal {-code}'}",
            was_killed=-code in _FROM_OUTSIDE,
        )
