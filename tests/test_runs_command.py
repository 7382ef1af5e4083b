"""Tests of jobs/runs.py and jobs/recorded_run.py: runs as a person reads of them."""

import dataclasses
import json
from pathlib import Path

import pytest

from jobs import runs
from jobs.logs import event_log
from jobs.recorded_run import close_run
from pipelines.runs.run_journal import RunJournal
from pipelines.runs.run_records import publish_record, record_path
from pipelines.runs.saving import save_report
from pipelines.store import Store
from tests.commands import Done, command
from tests.recorded_runs import REPORT, record

FAILED = dataclasses.replace(
    record(4), status="failed", numbers=None, num_encoded=70, error="StoreError: full"
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three nights that went well, the first with its report, and one that failed."""
    store = Store(str(tmp_path / "store"))
    for number, speed in ((1, 6_000), (2, 6_100), (3, 5_900)):
        publish_record(store, record(number, speed=speed, seconds=80.0 + 20 * number))
    publish_record(store, FAILED)
    run_id = record(1).run_id
    save_report(dataclasses.replace(REPORT, run_id=run_id), store_uri=store.uri)
    return store


def clipmill_runs(store: Store, action: str, *words: object) -> Done:
    done = command(runs.main, [action, "--store", store.uri, *map(str, words)])
    assert done.err == "" or done.code
    return done


def test_a_list_has_a_line_for_each_run(store):
    lines = clipmill_runs(store, "list").out.splitlines()
    assert lines[0].split() == [
        *("run", "night", "(UTC)", "status", "snapshot", "embedded", "rejects", "rows/s"),
        *("GPU-s/M", "engine"),
    ]
    assert lines[1].split() == [
        *(record(1).run_id, "2026-03-01", "03:15", "committed", "7", "480,000", "9", "4,800"),
        *("417", "fp8-0011223344556677"),
    ]
    assert lines[4].split()[3:5] == ["failed", "-"]
    assert lines[4].endswith("StoreError: full")
    assert len(clipmill_runs(store, "list", "--last", 2).out.splitlines()) == 3


def test_what_failed_after_its_commit_shows_its_snapshot(store):
    after = dataclasses.replace(FAILED, run_id=record(5).run_id, snapshot=8)
    publish_record(store, after)
    assert clipmill_runs(store, "list").out.splitlines()[-1].split()[3:5] == ["failed", "8"]
    assert clipmill_runs(store, "show", after.run_id, "--json").json["record"]["snapshot"] == 8


def test_a_list_in_json_has_the_measures(store):
    found = clipmill_runs(store, "list", "--json").json
    assert [entry["status"] for entry in found] == ["committed"] * 3 + ["failed"]
    assert (found[0]["rows_per_second"], found[0]["gpu_seconds"]) == (4_800, 200)
    assert (found[3]["numbers"], found[3]["rows_per_second"]) == (None, None)
    assert [entry["snapshot"] for entry in found] == [7, 7, 7, None]


def test_a_damaged_record_is_a_line(store):
    store.publish(record_path("20260303T040000-damaged"), b"{")
    assert "run.json is damaged" in clipmill_runs(store, "list").out
    assert "is damaged" in clipmill_runs(store, "list", "--json").json[3]["error"]


def test_a_page_is_written(store, tmp_path: Path):
    done = clipmill_runs(store, "list", "--page", tmp_path / "runs.html")
    assert done.out.endswith(f"page: {tmp_path / 'runs.html'}\n")
    assert "GPU-seconds per million rows" in (tmp_path / "runs.html").read_text()


def test_a_store_without_runs_says_so(tmp_path: Path):
    done = clipmill_runs(Store(str(tmp_path)), "list")
    assert (done.code, done.out) == (0, f"store {tmp_path} has no run on record\n")
    done = clipmill_runs(Store(str(tmp_path)), "show")
    assert done.code == 1
    assert "has no run on record" in done.err


def test_one_run_is_shown_with_its_stages(store):
    shown = clipmill_runs(store, "show", "20260301").out
    assert "  driver   clipmill nightly on head, Clipmill 0.1.0\n" in shown
    assert "  node     gpu-1: 16 CPUs, 2 GPUs (H200)\n" in shown
    assert "2 by tensorrt, images decoded by gpu; GPU-seconds 200\n" in shown
    assert "  encode        486,000 rows      150.0 busy s     2 workers   75%" in shown
    assert "truncated_image" in shown
    assert "  error    StoreError: full\n" in clipmill_runs(store, "show").out
    found = clipmill_runs(store, "show", "20260301", "--json").json
    assert found["report"]["stages"][0]["workers"] == 2


def test_two_runs_are_compared(store):
    done = clipmill_runs(store, "compare", "20260301", "20260303")
    rows = {line[:26].strip(): line[26:].split() for line in done.out.splitlines()}
    assert rows["seconds of the stages"] == ["100", "140", "x", "1.40"]
    assert rows["rows/s"] == ["4,800", "3,429", "x", "0.71"]
    assert rows["GPU-s per million rows"] == ["417", "583", "x", "1.40"]
    assert rows["encode alone, rows/s"] == ["6,480", "-"]
    assert rows["run"][-1] == "other"
    assert rows["engine"] == ["fp8-0011223344556677"] * 2
    found = clipmill_runs(store, "compare", "20260301", "20260303", "--json").json["compared"]
    by_name = {entry["measure"]: entry for entry in found}
    assert by_name["rows/s"]["ratio"] == pytest.approx(100 / 140)
    assert by_name["encode alone, rows/s"]["ratio"] is None
    failed = clipmill_runs(store, "compare", "20260301").out
    assert "rows encoded" in failed


def test_the_last_run_is_compared_with_the_one_before(store):
    found = clipmill_runs(store, "compare", "--json").json
    ids = [found[which]["run_id"] for which in ("first", "second")]
    assert ids == [record(3).run_id, record(4).run_id]


def test_the_first_run_has_none_before_it(tmp_path: Path):
    store = Store(str(tmp_path))
    publish_record(store, record(1))
    done = clipmill_runs(store, "compare")
    assert done.code == 1
    assert "no run before" in done.err


def test_a_bad_option_is_a_usage_error(store):
    assert clipmill_runs(store, "list", "--last", 0).code == 2


def test_a_slow_run_says_so_on_stderr_and_in_its_report(store, capsys):
    with (
        RunJournal(store, command="nightly") as journal,
        event_log("nightly", run_id=journal.run_id) as context,
    ):
        slow = dataclasses.replace(
            REPORT,
            run_id=journal.run_id,
            store_uri=store.uri,
            samples=[(0.0, 0), (20.0, 6_000), (120.0, 406_000)],
        )
        report, path = close_run(slow, journal, context)
    said, ended = map(json.loads, capsys.readouterr().err.splitlines())
    assert report.slow is not None
    assert report.slow.startswith("4,000 rows/s from the first batch on, 33% below 6,000")
    assert (said["event"], said["level"]) == ("slow", "warning")
    assert said["message"] == f"slow: {report.slow}"
    assert (said["run_id"], said["snapshot"]) == (journal.run_id, 7)
    assert (ended["event"], ended["num_embedded"], ended["gpu_seconds"]) == ("ended", 480_000, 200)
    assert report.slow.split(",")[0] in Path(str(path)).read_text()
    assert clipmill_runs(store, "list").out.splitlines()[-1].endswith(", slow")
    assert f"  slow     {report.slow}\n" in clipmill_runs(store, "show").out


def test_a_run_like_the_others_says_nothing(store, capsys):
    with RunJournal(store, command="nightly") as journal, event_log("nightly") as context:
        like = dataclasses.replace(REPORT, run_id=journal.run_id, store_uri=store.uri)
        report, _ = close_run(like, journal, context)
    assert report.slow is None
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events == ["ended"]


def test_a_report_that_cannot_be_saved_is_no_failure(tmp_path: Path, capsys):
    (tmp_path / "store").write_bytes(b"")  # a file in the store's place
    closed = Store(str(tmp_path / "store"))
    with RunJournal(closed, command="nightly") as journal, event_log("nightly") as context:
        report = dataclasses.replace(REPORT, run_id=journal.run_id, store_uri=closed.uri)
        _, path = close_run(report, journal, context)
    assert path is None
    said, ended = capsys.readouterr().err.splitlines()
    assert said.startswith("clipmill: snapshot 7 is committed; only its report is missing: store")
    assert json.loads(ended)["status"] == "committed"
