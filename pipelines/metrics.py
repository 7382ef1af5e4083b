"""Every metric of a run, declared once, and how it is told to Ray's metrics endpoint.

Knows nothing of what is measured. Ray puts `ray_` before each name, and its own labels beside ours.
"""

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ray.util import metrics as ray_metrics

# Ray forgets a gauge twice the time after it was told last; an export is every ten seconds.
REFRESH_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """What is measured, and by what it is told apart."""

    name: str
    """As Prometheus names it, with its unit, without Ray's prefix."""
    kind: Literal["counter", "gauge"]
    """Counters only grow, and begin at zero in each worker; gauges are set by the driver alone."""
    labels: tuple[str, ...]
    """Each with few values."""
    help: str
    """For people who read the scraped text."""


def _counter(name: str, labels: tuple[str, ...], help_: str) -> Metric:
    return Metric(name=name, kind="counter", labels=("store", *labels), help=help_)


def _gauge(name: str, labels: tuple[str, ...], help_: str) -> Metric:
    return Metric(name=name, kind="gauge", labels=("store", *labels), help=help_)


STAGE_ROWS = _counter("clipmill_stage_rows_total", ("stage",), "Rows that left a stage.")
STAGE_BYTES = _counter(
    "clipmill_stage_bytes_total", ("stage",), "Bytes read, decoded to, or written."
)
STAGE_BUSY = _counter(
    "clipmill_stage_busy_seconds_total", ("stage",), "Seconds of work, of all workers together."
)
STAGE_CORES = _counter(
    "clipmill_stage_core_seconds_total", ("stage",), "What that work took of their cores."
)
ENCODED = _counter(
    "clipmill_encoded_rows_total", ("modality",), "Images and texts that encoders encoded."
)
REJECTS = _counter(
    "clipmill_rejects_total", ("modality", "reason"), "Rows that the stages rejected."
)
ENGINE_BUILDS = _counter("clipmill_engine_builds_total", ("what",), "Engines and plans built.")
ENGINE_BUILD_SECONDS = _counter(
    "clipmill_engine_build_seconds_total", ("what",), "What building them took."
)
ENGINE_LOADS = _counter("clipmill_engine_loads_total", (), "Encoders that loaded an engine.")
ENGINE_LOAD_SECONDS = _counter(
    "clipmill_engine_load_seconds_total",
    (),
    "What loading took them, with the build of what was not there.",
)
RUN_START = _gauge(
    "clipmill_run_start_timestamp_seconds", (), "When the run began that is under way."
)
PHASE = _gauge(
    "clipmill_run_phase_timestamp_seconds",
    ("phase",),
    "When the phase of the run began that is under way.",
)
RUN_END = _gauge("clipmill_run_end_timestamp_seconds", ("outcome",), "When a run ended, and how.")
PLANNED = _gauge("clipmill_planned_rows", ("modality",), "Rows that the run is to encode.")
QUEUE = _gauge(
    "clipmill_stage_queue_rows", ("stage",), "Rows that wait for a stage or are in it, about."
)
WORKERS = _gauge("clipmill_stage_workers", ("stage",), "Workers of a stage there is room for.")
SNAPSHOT = _gauge("clipmill_snapshot_number", (), "The store's current snapshot.")
SNAPSHOT_TIME = _gauge(
    "clipmill_snapshot_timestamp_seconds", (), "When the current snapshot was committed."
)
SNAPSHOT_ROWS = _gauge("clipmill_snapshot_rows", ("modality",), "Embeddings in it.")
SNAPSHOT_REJECTS = _gauge("clipmill_snapshot_rejects", ("reason",), "Rejects in it.")
RECALL = _gauge(
    "clipmill_index_recall_ratio",
    ("modality", "queries"),
    "Recall of the ten nearest, by kind of queries.",
)
TARGET_RECALL = _gauge(
    "clipmill_index_target_recall_ratio", ("modality",), "Recall that was asked for."
)

METRICS = (
    STAGE_ROWS, STAGE_BYTES, STAGE_BUSY, STAGE_CORES, ENCODED, REJECTS, ENGINE_BUILDS,
    ENGINE_BUILD_SECONDS, ENGINE_LOADS, ENGINE_LOAD_SECONDS, RUN_START, PHASE, RUN_END, PLANNED,
    QUEUE, WORKERS, SNAPSHOT, SNAPSHOT_TIME, SNAPSHOT_ROWS, SNAPSHOT_REJECTS, RECALL, TARGET_RECALL,
)  # fmt: skip


def add(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
    """Count; what is nothing is not counted. Takes microseconds: call it for batches, not rows."""
    if value > 0:
        _counter_of(metric).inc(value, dict(labels))


def put(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
    """Set a gauge; within `kept`, it stays until `drop` or the block's end."""
    _gauge_of(metric).set(value, dict(labels))
    with _lock:
        if _num_keepers:
            _kept[metric, tuple(labels.items())] = value


def reset(metric: Metric) -> None:
    """Set a gauge to zero that is kept, whatever its labels."""
    with _lock:
        found = [labels for kept_metric, labels in _kept if kept_metric == metric]
    for labels in found:
        put(metric, 0, dict(labels))


def drop(metric: Metric) -> None:
    """Keep a gauge no longer, whatever its labels; Ray forgets it soon."""
    with _lock:
        for key in [key for key in _kept if key[0] == metric]:
            del _kept[key]


@contextmanager
def kept() -> Iterator[None]:
    """Tell gauges again and again for a block's length, and once more at its end."""
    global _num_keepers
    stopped = threading.Event()

    def refresh() -> None:
        while not stopped.wait(REFRESH_SECONDS):
            _tell_kept()

    thread = threading.Thread(target=refresh, name="metrics", daemon=True)
    with _lock:
        _num_keepers += 1
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        _tell_kept()
        with _lock:
            _num_keepers -= 1
            if not _num_keepers:
                _kept.clear()


def add_built(what: str, seconds: float, *, store: str) -> None:
    """Count an engine or a plan that was built; `store` is a label."""
    labels = {"store": store, "what": what}
    add(ENGINE_BUILDS, 1, labels)
    add(ENGINE_BUILD_SECONDS, seconds, labels)


_lock = threading.Lock()
_kept: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}
_num_keepers = 0


def _tell_kept() -> None:
    with _lock:
        told = dict(_kept)
    for (metric, labels), value in told.items():
        _gauge_of(metric).set(value, dict(labels))


@functools.cache
def _counter_of(metric: Metric) -> ray_metrics.Counter:
    return ray_metrics.Counter(metric.name, metric.help, metric.labels)


@functools.cache
def _gauge_of(metric: Metric) -> ray_metrics.Gauge:
    return ray_metrics.Gauge(metric.name, metric.help, metric.labels)
