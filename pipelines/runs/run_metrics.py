"""What a run tells of itself while it goes on, and of the snapshot and index that it leaves.

Knows nothing of what its workers count (`pipelines.progress.StageMeter`) or of how it is scraped.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Literal

from pipelines import metrics
from pipelines.counts import Counts
from pipelines.indexes.manifest import IndexManifest
from pipelines.metrics import put
from pipelines.progress import Progress
from pipelines.runs.run_journal import STOPS
from pipelines.snapshots import Snapshot
from pipelines.store_places import store_label

# Stopped: by hand, or by whoever told its process to end; that is nobody's fault.
Outcome = Literal["committed", "unchanged", "failed", "stopped"]
# Of a run: before rows are embedded, while they are, and what is done with them then.
Phase = Literal["plan", "embed", "assemble", "index"]
RECALL_AT = 10


# What there is of a run under way alone.
OF_RUN = (
    metrics.RUN_START,
    metrics.PHASE,
    metrics.PLANNED,
    metrics.QUEUE,
    metrics.WORKERS,
)


class ToldRun:
    """A run under way."""

    outcome: Outcome = "failed"
    """To be set once it is another."""


@contextmanager
def told_run(store_uri: str) -> Iterator[ToldRun]:
    """Tell when a run began, and how it ended; keep what is told meanwhile.

    Within it Ray is initialized. A run that is killed tells no end.
    """
    run, store = ToldRun(), {"store": store_label(store_uri)}
    with metrics.kept():
        put(metrics.RUN_START, time.time(), store)
        tell_phase(store_uri, "plan")
        try:
            yield run
        except STOPS:
            run.outcome = "stopped"
            raise
        finally:
            for metric in OF_RUN:
                metrics.drop(metric)
            put(metrics.RUN_END, time.time(), {**store, "outcome": run.outcome})


def tell_phase(store_uri: str, phase: Phase) -> None:
    """Tell what a run does from now on; outside of `embed` no rows wait for a stage."""
    metrics.drop(metrics.PHASE)
    put(metrics.PHASE, time.time(), {"store": store_label(store_uri), "phase": phase})
    if phase != "embed":
        metrics.reset(metrics.QUEUE)


def tell_plan(store_uri: str, counts: Counts, *, workers: Mapping[str, int]) -> None:
    """Tell what is to be encoded, and by how many workers of each stage."""
    store = {"store": store_label(store_uri)}
    for modality, keys in counts.keys.items():
        put(metrics.PLANNED, keys.num_encoded, {**store, "modality": modality})
    for stage, num_workers in workers.items():
        put(metrics.WORKERS, num_workers, {**store, "stage": stage})


def tell_progress(store_uri: str, counts: Counts, progress: Progress) -> None:
    """Tell what waits for each stage."""
    for stage, num_rows in queues(counts, progress).items():
        put(metrics.QUEUE, num_rows, {"store": store_label(store_uri), "stage": stage})


def queues(counts: Counts, progress: Progress) -> dict[str, int]:
    """Stage -> rows that the stage before is done with, and it is not.

    What is read counts once for each modality that it is to be encoded for, by the mean of the
    plan. A GPU's decoder is a part of encoding, and has no queue of its own.
    """
    stages = progress.stages
    modalities = counts.num_encoded / counts.num_due_rows if counts.num_due_rows else 1.0
    queue = {"read": counts.num_due_rows - stages["read"].num_rows}
    before = round(stages["read"].num_rows * modalities)
    for stage in list(stages)[1:]:
        if not (stage == "decode" and "prepare" in stages):
            queue[stage] = before - stages[stage].num_rows
            before = stages[stage].num_rows
    return {stage: max(0, num_rows) for stage, num_rows in queue.items()}


def tell_snapshot(
    store_uri: str, snapshot: Snapshot, *, rejects_by_reason: Mapping[str, int] | None = None
) -> None:
    """Tell which snapshot is current, since when, and what is in it."""
    store = {"store": store_label(store_uri)}
    put(metrics.SNAPSHOT, snapshot.number, store)
    put(metrics.SNAPSHOT_TIME, datetime.fromisoformat(snapshot.created_at).timestamp(), store)
    for modality in snapshot.modalities:
        num_rows = snapshot.num_rows("embeddings", modality=modality)
        put(metrics.SNAPSHOT_ROWS, num_rows, {**store, "modality": modality})
    if rejects_by_reason is not None:
        metrics.drop(metrics.SNAPSHOT_REJECTS)
        for reason, num_rows in rejects_by_reason.items():
            put(metrics.SNAPSHOT_REJECTS, num_rows, {**store, "reason": reason})


def tell_indexes(store_uri: str, indexes: Iterable[IndexManifest]) -> None:
    """Tell what indexes find, and what they were asked to."""
    store = {"store": store_label(store_uri)}
    for index in indexes:
        labels = {**store, "modality": index.modality}
        put(metrics.TARGET_RECALL, index.min_recall, labels)
        for kind, recall in index.recall_at(RECALL_AT).items():
            put(metrics.RECALL, recall, {**labels, "queries": kind})
