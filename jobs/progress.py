"""Shows a run's progress: bars in a terminal, an event now and then in a log.

Knows nothing of how the counts come about. Events are seen within `jobs.logs.event_log`.
"""

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from engine.progress import OnProgress
from jobs.logs import event
from pipelines.counts import Counts
from pipelines.progress import Progress as RunProgress

LOG_SECONDS = 30.0
_log = logging.getLogger(__name__)


class ProgressSink(Protocol):
    """What `pipelines.embedding.embed` calls while it runs."""

    def __call__(self, counts: Counts, progress: RunProgress) -> None:
        """Show the counts of now."""
        ...


@contextmanager
def shown_progress() -> Iterator[ProgressSink]:
    """Show progress on stderr for the length of a block."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    with Progress(
        TextColumn("{task.description:>7}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bars:
        yield _Bars(bars)


@contextmanager
def shown_steps() -> Iterator[OnProgress]:
    """Show stages and their steps on stderr for the length of a block.

    Yields:
        To be called with a stage's name, and how many of how many steps are done; 0 of 0 for a
        stage that does not count.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _StepLines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        yield _StepBars(bars)


class _StepBars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._stage: str | None = None
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._finish()
            self._stage, self._task = stage, self._bars.add_task(stage, total=total or None)
        if self._task is not None:
            self._bars.update(self._task, completed=done)

    def _finish(self) -> None:
        """A stage that does not count ends when the next begins."""
        if self._task is not None:
            task = next(task for task in self._bars.tasks if task.id == self._task)
            total = task.total or 1
            self._bars.update(self._task, completed=total, total=total)


class _StepLines:
    def __init__(self) -> None:
        self._stage: str | None = None
        self._said_seconds = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == self._stage and now - self._said_seconds < LOG_SECONDS:
            return
        self._stage, self._said_seconds = stage, now
        counts = f" {done} of {total}" if total else ""
        _log.info("%s%s", stage, counts, extra=event("step", stage=stage, done=done, total=total))


class _RateColumn(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        return Text(f"{speed:,.0f} rows/s" if speed else "", style="cyan")


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, counts: Counts, progress: RunProgress) -> None:
        for stage in progress.stages:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(
                    stage, total=bar_total(counts, stage, stages=progress.stages)
                )
            self._bars.update(self._tasks[stage], completed=progress.stages[stage].num_rows)


class _Lines:
    def __init__(self) -> None:
        self._next_seconds = LOG_SECONDS

    def __call__(self, counts: Counts, progress: RunProgress) -> None:
        if progress.seconds < self._next_seconds:
            return
        self._next_seconds = progress.seconds + LOG_SECONDS
        fields = progress_fields(counts, progress)
        _log.info(progress_line(counts, progress), extra=event("progress", **fields))


def stage_total(counts: Counts, stage: str) -> int:
    """Rows that a stage has to do: rows of the catalog to read, then one for each modality."""
    return counts.num_due_rows if stage == "read" else counts.num_encoded


def bar_total(counts: Counts, stage: str, *, stages: Collection[str]) -> int | None:
    """The same for a bar; None where nobody knows how many images are left to the GPUs."""
    by_gpus = stage == "decode" and "prepare" in stages
    return None if by_gpus else stage_total(counts, stage)


def progress_fields(counts: Counts, progress: RunProgress) -> dict[str, float | dict[str, int]]:
    """Progress in numbers for a log."""
    return {
        "seconds": round(progress.seconds, 3),
        "rows": {name: count.num_rows for name, count in progress.stages.items()},
        "total_rows": stage_total(counts, "encode"),
    }


def progress_line(counts: Counts, progress: RunProgress) -> str:
    """Progress in one line for a log."""
    total, done = stage_total(counts, "encode"), progress.stages["encode"].num_rows
    rate = done / progress.seconds if progress.seconds else 0.0
    left = f"{(total - done) / rate:,.0f} s left" if rate else "time left unknown"
    stages = ", ".join(f"{name} {count.num_rows:,}" for name, count in progress.stages.items())
    return f"{progress.seconds:,.0f} s: {stages} of {total:,} rows; {rate:,.1f} rows/s, {left}"
