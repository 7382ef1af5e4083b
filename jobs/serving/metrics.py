"""What a service counts, in the form that Prometheus reads.

Knows nothing of how requests are answered.
"""

import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pipelines.indexes.manifest import IndexManifest
from pipelines.runs.run_metrics import RECALL_AT

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts of one replica."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "clipmill_requests",
            "Requests answered.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "clipmill_request_seconds",
            "From a request's start to its answer's end.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.concurrent = Gauge(
            "clipmill_requests_in_progress", "Requests being answered.", registry=self.registry
        )
        self.batches = Histogram(
            "clipmill_batch_queries",
            "Queries that were encoded and searched at once.",
            buckets=_BATCHES,
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "clipmill_batch_seconds",
            "Encoding and searching of one batch.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.snapshot = Gauge(
            "clipmill_snapshot", "Number of the snapshot that answers.", registry=self.registry
        )
        self.snapshot_age = Gauge(
            "clipmill_snapshot_age_seconds",
            "Since the snapshot that answers was committed.",
            registry=self.registry,
        )
        self.rows = Gauge(
            "clipmill_rows", "Rows that are searched.", ["among"], registry=self.registry
        )
        self.recall = Gauge(
            "clipmill_index_recall_ratio",
            "Recall of the ten nearest when the index was built, by kind of queries.",
            ["among", "queries"],
            registry=self.registry,
        )
        self.target_recall = Gauge(
            "clipmill_index_target_recall_ratio",
            "Recall that was asked for.",
            ["among"],
            registry=self.registry,
        )
        self.openings = Counter(
            "clipmill_snapshot_openings",
            "Snapshots that were opened, or could not be.",
            ["result"],
            registry=self.registry,
        )
        for result in ("opened", "failed"):
            self.openings.labels(result)
        self.is_behind = Gauge(
            "clipmill_snapshot_behind",
            "1 while a newer snapshot cannot be opened, and an older one answers.",
            registry=self.registry,
        )
        self._created_seconds: float | None = None

    def answers_from(self, *, number: int, created_seconds: float) -> None:
        """Note which snapshot answers now, and when it was committed (seconds since 1970)."""
        self.snapshot.set(number)
        self._created_seconds = created_seconds

    def finds(self, index: IndexManifest) -> None:
        """Note what an index finds, and what it was asked to."""
        self.target_recall.labels(index.modality).set(index.min_recall)
        for queries, recall in index.recall_at(RECALL_AT).items():
            self.recall.labels(index.modality, queries).set(recall)

    def families(self) -> list[Metric]:
        """All counts of now."""
        if self._created_seconds is not None:
            self.snapshot_age.set(max(0.0, time.time() - self._created_seconds))
        return list(self.registry.collect())


class _Merged(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def exposition(replicas: Sequence[tuple[str, Sequence[Metric]]]) -> bytes:
    """The text that Prometheus scrapes.

    Args:
        replicas: Name and counts of each; the name becomes the label `replica`.
    """
    merged: dict[str, Metric] = {}
    for name, families in replicas:
        for family in families:
            into = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type, family.unit)
            )
            into.samples += [
                sample._replace(labels={**sample.labels, "replica": name})
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
    registry = CollectorRegistry()
    registry.register(_Merged(list(merged.values())))
    return generate_latest(registry)
