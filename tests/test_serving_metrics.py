"""What Prometheus reads, parsed as it would: one family each, the replicas told apart."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.serving.metrics import Metrics, exposition
from tests.stored import index_manifest


def parsed(text: bytes) -> dict[tuple[str, str], float]:
    """(sample, replica) -> value, of counters without further labels summed."""
    values: dict[tuple[str, str], float] = {}
    names = []
    for family in text_string_to_metric_families(text.decode()):
        names.append(family.name)
        for sample in family.samples:
            place = (sample.name, sample.labels["replica"])
            values[place] = values.get(place, 0.0) + sample.value
    assert len(names) == len(set(names))
    return values


def test_replicas_are_told_apart_in_one_text():
    one, two = Metrics(), Metrics()
    one.requests.labels("/search", "POST", "200").inc(3)
    two.requests.labels("/search", "POST", "200").inc(4)
    two.requests.labels("/search", "POST", "503").inc()
    two.batches.observe(8)
    values = parsed(exposition([("a", one.families()), ("b", two.families())]))
    assert values["clipmill_requests_total", "a"] == 3
    assert values["clipmill_requests_total", "b"] == 5
    assert values["clipmill_batch_queries_sum", "a"] == 0
    assert values["clipmill_batch_queries_sum", "b"] == 8


def test_the_age_of_the_snapshot_grows(monkeypatch):
    metrics = Metrics()
    assert parsed(exposition([("a", metrics.families())]))["clipmill_snapshot", "a"] == 0
    metrics.answers_from(number=7, created_seconds=1_000.0)
    for now, age in ((1_060.0, 60), (1_090.0, 90)):
        monkeypatch.setattr("jobs.serving.metrics.time.time", lambda now=now: now)
        values = parsed(exposition([("a", metrics.families())]))
        assert values["clipmill_snapshot_age_seconds", "a"] == pytest.approx(age)
    assert values["clipmill_snapshot", "a"] == 7


def test_what_the_index_finds_is_told():
    metrics = Metrics()
    metrics.finds(index_manifest(image=0.97, text=0.96))
    values = parsed(exposition([("a", metrics.families())]))
    assert values["clipmill_index_recall_ratio", "a"] == pytest.approx(0.97 + 0.96)
    assert values["clipmill_index_target_recall_ratio", "a"] == 0.95
