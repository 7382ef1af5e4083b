"""Tests of pipelines/runs/run_history.py."""

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from pipelines.errors import StoreError
from pipelines.runs.run_history import KILLED_SECONDS, find_run, read_history, readable, run_ids
from pipelines.runs.run_records import RunRecord, publish_record, record_path
from pipelines.store import Store
from tests.recorded_runs import record


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path))
    for number in (3, 1, 2):
        publish_record(store, record(number))
    return store


def running(number: int, *, silent_seconds: float) -> RunRecord:
    seen = datetime.now(UTC) - timedelta(seconds=silent_seconds)
    return dataclasses.replace(
        record(number), status="running", numbers=None, seen_at=seen.isoformat(timespec="seconds")
    )


def test_the_newest_is_the_last(store):
    records = readable(read_history(store, num_last=10))
    assert records == [record(1), record(2), record(3)]
    assert [name for name, _ in read_history(store, num_last=2)] == run_ids(store)[1:]


def test_a_store_without_runs(tmp_path):
    empty = Store(str(tmp_path / "nothing"))
    assert read_history(empty, num_last=10) == []
    with pytest.raises(StoreError, match="has no run on record"):
        find_run(empty, None)


def test_a_run_that_is_long_silent_was_killed(store):
    publish_record(store, running(4, silent_seconds=KILLED_SECONDS + 60))
    publish_record(store, running(5, silent_seconds=KILLED_SECONDS - 60))
    statuses = [found.status for found in readable(read_history(store, num_last=10))]
    assert statuses == ["committed"] * 3 + ["killed", "running"]
    assert find_run(store, record(4).run_id).status == "killed"


def test_a_damaged_record_hides_no_other(store):
    store.publish(record_path("20260302T040000-damaged"), b"{")
    store.publish("runs/20260302T050000-else/notes.txt", b"of somebody else")
    history = read_history(store, num_last=10)
    assert len(history) == 4
    assert isinstance(history[2][1], StoreError)
    assert readable(history) == [record(1), record(2), record(3)]


@pytest.mark.parametrize("seen_at", ["yesterday", "2026-01-01T00:00:00", None])
def test_a_record_without_a_time_hides_no_other(store, seen_at):
    publish_record(store, dataclasses.replace(record(2), seen_at=seen_at))
    history = dict(read_history(store, num_last=10))
    damaged = history[record(2).run_id]
    assert isinstance(damaged, StoreError)
    assert "is no time with a zone" in str(damaged)
    assert readable(list(history.items())) == [record(1), record(3)]


def test_a_run_is_found_by_how_its_name_begins(store):
    assert find_run(store, None) == record(3)
    assert find_run(store, record(2).run_id) == record(2)
    assert find_run(store, "20260301") == record(1)
    with pytest.raises(StoreError, match="3 runs begin with '202603'"):
        find_run(store, "202603")
    with pytest.raises(StoreError, match="no run begins with 'x'; `clipmill runs list`"):
        find_run(store, "x")
