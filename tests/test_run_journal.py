"""Tests of pipelines/runs/run_journal.py."""

import dataclasses
import time

import pytest

from jobs.stopping import Terminated
from pipelines.errors import CatalogError, StoreError
from pipelines.progress import STAGES, Progress, StageCount
from pipelines.runs.run_history import run_ids
from pipelines.runs.run_journal import RunJournal
from pipelines.runs.run_records import RunRecord, read_record
from pipelines.snapshots import commit
from pipelines.store import Store
from tests.recorded_runs import REPORT
from tests.stored import make_snapshot
from tests.waiting import wait_until


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def progress(num_encoded: int) -> Progress:
    stages = {stage: StageCount() for stage in STAGES}
    stages["encode"].num_rows = num_encoded
    return Progress(seconds=1.0, stages=stages)


def on_record(store: Store, journal: RunJournal) -> RunRecord:
    found = read_record(store, journal.run_id)
    assert found is not None
    return found


def test_a_run_is_on_record_from_its_beginning_to_its_end(store):
    with RunJournal(store, command="nightly") as journal:
        begun = on_record(store, journal)
        assert (begun.status, begun.command, begun.numbers) == ("running", "nightly", None)
        journal.finish(dataclasses.replace(REPORT, run_id=journal.run_id))
    ended = on_record(store, journal)
    assert (ended.status, ended.num_encoded) == ("committed", 486_000)
    assert ended.numbers.gpu_seconds == 200
    assert ended.started_at == begun.started_at


def test_a_run_that_changed_nothing_says_so(store):
    with RunJournal(store, command="embed") as journal:
        journal.finish(dataclasses.replace(REPORT, committed=False))
    assert on_record(store, journal).status == "unchanged"


def test_a_run_that_raises_has_failed(store):
    journal = RunJournal(store, command="embed")
    journal.note(progress(70))
    with pytest.raises(CatalogError), journal:
        raise CatalogError("catalog s3://me:secret@bucket/a?token=secret: gone\nand more")
    failed = on_record(store, journal)
    assert (failed.status, failed.num_encoded) == ("failed", 70)
    assert failed.error == "CatalogError: catalog s3://***@bucket/a?***: gone and more"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated, SystemExit])
def test_a_run_stopped_by_hand_has_not_failed(store, stop):
    journal = RunJournal(store, command="embed")
    with pytest.raises(stop), journal:
        raise stop
    stopped = on_record(store, journal)
    assert (stopped.status, stopped.error) == ("stopped", stop.__name__)
    assert stopped.snapshot is None


def test_what_a_run_committed_before_it_failed_is_on_record(store):
    other = dataclasses.replace(make_snapshot([]), run_id="another")
    commit(store, other)
    journal = RunJournal(store, command="nightly")
    mine = dataclasses.replace(make_snapshot([], number=2), run_id=journal.run_id)

    def commit_and_fail() -> None:
        with journal:
            commit(store, mine)
            raise CatalogError("after the commit")

    with pytest.raises(CatalogError):
        commit_and_fail()
    failed = on_record(store, journal)
    assert (failed.status, failed.snapshot, failed.numbers) == ("failed", 2, None)
    later = RunJournal(store, command="nightly")
    with pytest.raises(CatalogError), later:
        raise CatalogError("before its own")
    assert on_record(store, later).snapshot is None


def test_what_raises_after_the_end_leaves_the_end_on_record(store):
    journal = RunJournal(store, command="embed")

    def report_and_fail() -> None:
        with journal:
            journal.finish(REPORT)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        report_and_fail()
    assert on_record(store, journal).status == "committed"


def test_a_run_without_work_leaves_nothing(store):
    with RunJournal(store, command="nightly") as journal:
        assert run_ids(store) == [journal.run_id]
    assert run_ids(store) == []


def test_while_it_goes_on_it_says_how_far_it_is(store):
    with RunJournal(store, command="embed", beat_seconds=0.01) as journal:
        journal.note(progress(123))
        wait_until(lambda: on_record(store, journal).num_encoded == 123)
        assert on_record(store, journal).status == "running"
        journal.finish(REPORT)
    time.sleep(0.05)
    assert on_record(store, journal).status == "committed", "no beat after the end"


def test_a_store_that_cannot_be_written_stops_no_run(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    closed = Store(str(tmp_path / "file" / "store"))
    with RunJournal(closed, command="embed", beat_seconds=0.01) as journal:
        time.sleep(0.05)
        with pytest.raises(StoreError):
            journal.finish(REPORT)
    journal = RunJournal(closed, command="embed")
    with pytest.raises(RuntimeError, match="its own"), journal:
        raise RuntimeError("its own")
