"""Counts what the stages do while they do it, across all workers of a run.

Knows nothing of how progress is shown. The counts serve progress, timing and metrics; what is in
the store is counted from its files.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from pipelines import metrics
from pipelines.cluster.spilling import SpillCount
from pipelines.cluster.worker_logs import redact_worker
from pipelines.metrics import Metric

STAGES = ("read", "decode", "encode", "write")
# Where GPUs decode, CPUs prepare: they look at headers and decode what GPUs do not take.
GPU_STAGES = ("read", "prepare", "decode", "encode", "write")
SAMPLE_SECONDS = 1.0
POLL_SECONDS = 0.5
# A series beyond this length is thinned to every other sample, so that a long run's stays small.
MAX_SAMPLES = 2_000

# Not of a meter, which travels to workers.
_COUNTING = threading.Lock()


@dataclass(slots=True)
class StageCount:
    """What one stage has done so far."""

    num_rows: int = 0
    """Rows that left the stage; a catalog row counts once for each modality after decode."""
    num_bytes: int = 0
    """Bytes read, decoded to, or written; 0 where a stage has no such measure."""
    busy_seconds: float = 0.0
    """Summed over all workers; once where batches ran side by side in one."""
    core_seconds: float = 0.0
    """What their processes took of their cores meanwhile; 0 where it was not measured."""


@dataclass(slots=True)
class Progress:
    """A run so far."""

    seconds: float
    """Since the run began."""
    stages: dict[str, StageCount]
    """By name, in order: STAGES, or GPU_STAGES where GPUs decode."""
    samples: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, rows encoded) about once a second, for the plot of the rate."""
    spilled_bytes: int | None = None
    """That object stores of the cluster wrote to disk meanwhile, for all jobs, as `SpillCount` has
    it; None before the end."""


# Killed, it starts again from nothing: a run need not end for the sake of its counts.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ProgressBoard:
    """The actor that workers report to."""

    def __init__(self, stages: Sequence[str] = STAGES) -> None:
        """Start the clock."""
        redact_worker()
        self._spilling = SpillCount()
        self._started = time.monotonic()
        self._stages = {stage: StageCount() for stage in stages}
        self._samples: list[tuple[float, int]] = [(0.0, 0)]
        self._sample_seconds = SAMPLE_SECONDS
        self._begun: dict[str, list[str]] = {}

    def add(
        self,
        stage: str,
        num_rows: int,
        num_bytes: int,
        busy_seconds: float,
        core_seconds: float = 0.0,
    ) -> None:
        """Count one batch."""
        count = self._stages[stage]
        count.num_rows += num_rows
        count.num_bytes += num_bytes
        count.busy_seconds += busy_seconds
        count.core_seconds += core_seconds
        seconds = time.monotonic() - self._started
        if stage == "encode" and seconds - self._samples[-1][0] >= self._sample_seconds:
            self._samples.append((seconds, count.num_rows))
            if len(self._samples) > MAX_SAMPLES:
                self._samples = self._samples[::2]
                self._sample_seconds *= 2

    def progress(self) -> Progress:
        """All counts."""
        seconds = time.monotonic() - self._started
        last = (seconds, self._stages["encode"].num_rows)
        return Progress(seconds=seconds, stages=self._stages, samples=[*self._samples, last])

    def final_progress(self) -> Progress:
        """The same once the stages have ended, with what was spilled."""
        return replace(self.progress(), spilled_bytes=self._spilling.num_bytes())

    def begin(self, piece: str, node_id: str) -> list[str]:
        """Note where a piece of work begins; gives the nodes where it began before without an end.

        Only of tasks that were begun again and again (`attempts.attempted`).
        """
        begun_on = self._begun.setdefault(piece, [])
        before = list(begun_on)
        begun_on.append(node_id)
        return before

    def end(self, piece: str) -> None:
        """Forget where it began: it did not end anybody."""
        self._begun.pop(piece, None)  # unknown, if this board was killed meanwhile


class StageMeter:
    """Times one stage in one worker and reports it to the board, without waiting for it.

    The same counts are metrics of the worker. They are of work done: what is done again, since a
    worker or a node was lost with what came of it, counts again.
    """

    def __init__(self, board: Any, *, stage: str, store: str = "") -> None:
        """Measure nothing yet.

        Args:
            board: Handle of a ProgressBoard.
            stage: Name of the stage.
            store: As metrics name it (`store_places.store_label`).
        """
        self._board = board
        self._stage = stage
        self._store = store
        self._num_running = 0
        # Readings of the clocks up to which seconds are counted, while batches run.
        self._counted_until = self._core_counted_until = 0.0

    @contextmanager
    def batch(self) -> Iterator[Callable[[int, int], None]]:
        """Time a batch; call the given function with its rows and bytes before the end."""
        sizes = (0, 0)

        def size(num_rows: int, num_bytes: int) -> None:
            nonlocal sizes
            sizes = (num_rows, num_bytes)

        with _COUNTING:
            if self._num_running == 0:
                self._uncounted_seconds()
            self._num_running += 1
        try:
            yield size
            with _COUNTING:
                seconds = self._uncounted_seconds()
        finally:
            with _COUNTING:
                self._num_running -= 1
        self.count(*sizes, *seconds)

    def _uncounted_seconds(self) -> tuple[float, float]:
        """What has passed since the last call, and what this process took of its cores."""
        before, core_before = self._counted_until, self._core_counted_until
        self._counted_until, self._core_counted_until = time.perf_counter(), time.process_time()
        return self._counted_until - before, self._core_counted_until - core_before

    def count(
        self, num_rows: int, num_bytes: int, busy_seconds: float, core_seconds: float = 0.0
    ) -> None:
        """Count a batch that was timed otherwise."""
        self._board.add.remote(self._stage, num_rows, num_bytes, busy_seconds, core_seconds)
        labels = {"stage": self._stage}
        self.add(metrics.STAGE_ROWS, num_rows, labels)
        self.add(metrics.STAGE_BYTES, num_bytes, labels)
        self.add(metrics.STAGE_BUSY, busy_seconds, labels)
        self.add(metrics.STAGE_CORES, core_seconds, labels)

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Count something of the stage in a metric of its own; `store` is one of its labels."""
        metrics.add(metric, value, {"store": self._store, **labels})

    def begin(self, piece: str, *, node_id: str) -> list[str]:
        """As the board's; waits until it knows."""
        begun_on: list[str] = ray.get(self._board.begin.remote(piece, node_id))
        return begun_on

    def end(self, piece: str) -> None:
        """As the board's; waits until it knows."""
        ray.get(self._board.end.remote(piece))


@contextmanager
def metered(meter: StageMeter | None) -> Iterator[Callable[[int, int], None]]:
    """`meter.batch()`, or without a meter the same that counts nothing."""
    if meter is None:
        yield lambda num_rows, num_bytes: None
        return
    with meter.batch() as size:
        yield size


@contextmanager
def polled(board: Any, on_progress: Callable[[Progress], None] | None) -> Iterator[None]:
    """Hand a board's progress to `on_progress` now and then, and once at the end."""
    if on_progress is None:
        yield
        return
    stopped = threading.Event()

    def poll() -> None:
        while not stopped.wait(POLL_SECONDS):
            on_progress(ray.get(board.progress.remote()))

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        on_progress(ray.get(board.progress.remote()))
