"""What waits for a stage, and what a run tells from its start to its end, without Ray."""

import pytest

from pipelines import metrics
from pipelines.counts import Counts, KeyCounts
from pipelines.metrics import (
    PHASE,
    PLANNED,
    QUEUE,
    RUN_END,
    RUN_START,
    SNAPSHOT,
    SNAPSHOT_REJECTS,
)
from pipelines.progress import GPU_STAGES, STAGES, Progress, StageCount
from pipelines.runs.run_metrics import (
    queues,
    tell_phase,
    tell_plan,
    tell_progress,
    tell_snapshot,
    told_run,
)
from pipelines.store_places import store_label
from tests.stored import make_snapshot


def counts() -> Counts:
    """40 rows to be read, of which 40 images and 20 texts are to be encoded."""
    keys = {
        name: KeyCounts(
            num_new=num,
            num_changed=0,
            num_retried=0,
            num_moved=0,
            num_unchanged=5,
            num_staged=0,
            num_deleted=0,
            num_twins=0,
        )
        for name, num in (("image", 40), ("text", 20))
    }
    return Counts(num_rows=50, num_keys=45, num_due_rows=40, keys=keys)


def progress(stages: tuple[str, ...], *num_rows: int) -> Progress:
    done = {name: StageCount(num_rows=num) for name, num in zip(stages, num_rows, strict=True)}
    return Progress(seconds=1.0, stages=done)


def test_queues_are_what_the_stage_before_is_ahead():
    # 30 rows read are 45 to decode.
    found = queues(counts(), progress(STAGES, 30, 32, 20, 16))
    assert found == {"read": 10, "decode": 13, "encode": 12, "write": 4}
    # Of a GPU's decoder only images count, which is part of encoding.
    found = queues(counts(), progress(GPU_STAGES, 30, 32, 5, 20, 16))
    assert found == {"read": 10, "prepare": 13, "encode": 12, "write": 4}


def test_queues_are_never_negative():
    # A board that began anew, and a plan of which nothing is read.
    assert set(queues(counts(), progress(STAGES, 0, 0, 20, 30)).values()) == {40, 0}
    nothing = Counts(num_rows=0, num_keys=0, num_due_rows=0, keys={})
    assert queues(nothing, progress(STAGES, 0, 0, 0, 0)) == dict.fromkeys(STAGES, 0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str], float]]:
    """Every gauge that is set, in order: name, labels, value."""
    found = []

    class ListGauge:
        def __init__(self, metric: metrics.Metric) -> None:
            self._metric = metric

        def set(self, value: float, labels: dict[str, str]) -> None:
            assert set(labels) == set(self._metric.labels)
            found.append((self._metric.name, labels, value))

    monkeypatch.setattr(metrics, "_gauge_of", ListGauge)
    return found


def ends(told: list) -> list[str]:
    return [labels["outcome"] for name, labels, _ in told if name == RUN_END.name]


def test_a_run_tells_its_outcome_and_is_failed_until_then(told: list):
    with told_run("s3://bucket/a/vectors") as run:
        assert told[0][:2] == (RUN_START.name, {"store": store_label("s3://bucket/a/vectors")})
        tell_plan("s3://bucket/a/vectors", counts(), workers={"read": 8})
        run.outcome = "unchanged"
    assert ends(told) == ["unchanged", "unchanged"]  # at the end, and kept
    told.clear()
    with pytest.raises(RuntimeError), told_run("s3://bucket/a/vectors"):
        raise RuntimeError
    assert set(ends(told)) == {"failed"}
    assert PLANNED.name not in {name for name, _, _ in told}
    told.clear()
    with pytest.raises(KeyboardInterrupt), told_run("s3://bucket/a/vectors"):
        raise KeyboardInterrupt
    assert set(ends(told)) == {"stopped"}


def test_of_phases_the_last_is_kept_and_rows_wait_only_while_they_are_embedded(told: list):
    def kept() -> dict[str, dict[str, float]]:
        told.clear()
        metrics._tell_kept()
        found: dict[str, dict[str, float]] = {PHASE.name: {}, QUEUE.name: {}}
        for name, labels, value in told:
            if name in found:
                found[name][labels.get("phase") or labels["stage"]] = value
        return found

    uri = "s3://bucket/a/vectors"
    with told_run(uri):
        assert kept()[PHASE.name].keys() == {"plan"}
        tell_phase(uri, "embed")
        tell_progress(uri, counts(), progress(STAGES, 30, 32, 20, 16))
        assert kept()[QUEUE.name] == {"read": 10, "decode": 13, "encode": 12, "write": 4}
        tell_phase(uri, "index")
        found = kept()
        assert found[PHASE.name].keys() == {"index"}
        assert found[QUEUE.name] == dict.fromkeys(STAGES, 0)
    told.clear()
    metrics._tell_kept()
    assert told == []


def test_gauges_are_told_again_while_a_run_goes_on(told: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "REFRESH_SECONDS", 0.01)
    with told_run("vectors"):
        metrics.put(SNAPSHOT, 7, {"store": "vectors"})
        for _ in range(1_000):
            if sum(name == SNAPSHOT.name for name, _, _ in told) > 3:
                break
            metrics.threading.Event().wait(0.01)
        else:
            pytest.fail("told once")
    assert told[-1][0] == RUN_END.name
    told.clear()
    metrics.put(SNAPSHOT, 8, {"store": "vectors"})
    assert [value for _, _, value in told] == [8]


def test_reasons_of_the_snapshot_before_are_kept_no_longer(told: list):
    with told_run("vectors"):
        snapshot = make_snapshot([])
        tell_snapshot("vectors", snapshot, rejects_by_reason={"empty_text": 3})
        tell_snapshot("vectors", snapshot, rejects_by_reason={"null_key": 1})
        told.clear()
    kept = [(labels["reason"], value) for name, labels, value in told if "rejects" in name]
    assert kept == [("null_key", 1)]
    assert SNAPSHOT_REJECTS.name in {name for name, _, _ in told}
