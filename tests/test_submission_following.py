"""Following a job over connections that break, hang and end."""

import io
import json
from collections.abc import Iterator
from datetime import datetime

import pytest

from jobs.submission import following
from jobs.submission.entrypoint import STDOUT_MARK
from jobs.submission.following import LogLines, follow
from jobs.submission.server import JobServer, UnknownJobError, UnreachableError
from tests.job_server import FakeJobServer, ScriptedJob, fake_job_server


@pytest.fixture
def server() -> Iterator[FakeJobServer]:
    with fake_job_server() as running:
        yield running


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_MAX_PAUSE_SECONDS", 0.01)


def test_lines_are_parted_wherever_pieces_end():
    log = f"one\n{STDOUT_MARK}two\n\nthree {STDOUT_MARK}\n{STDOUT_MARK}\nfour"
    for size in range(1, len(log) + 1):
        out, err = io.StringIO(), io.StringIO()
        lines = LogLines(out=out, err=err)
        for start in range(0, len(log), size):
            lines.take(log[start : start + size])
        lines.end()
        assert out.getvalue() == "two\n\n"
        assert err.getvalue() == f"one\n\nthree {STDOUT_MARK}\nfour\n"
        assert lines.num_characters == len(log)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_events_say_and_a_file_has_them_whole():
    event = {"time": "2026-11-29T13:35:21+00:00", "level": "warning", "message": "waits for a GPU"}
    others = '{"other": 1}\n{no json\n7\n'
    at = datetime.fromisoformat(event["time"]).astimezone()
    for err, expected in (
        (Terminal(), f"{at:%H:%M:%S} warning: waits for a GPU\n{others}"),
        (io.StringIO(), f"{json.dumps(event)}\n{others}"),
    ):
        LogLines(out=io.StringIO(), err=err).take(f"{json.dumps(event)}\n{others}")
        assert err.getvalue() == expected


@pytest.mark.parametrize("breaks_after", [[0], [1], [2, 2, 1], [3, 0]])
def test_each_line_comes_once_however_often_the_connection_breaks(
    server: FakeJobServer, breaks_after: list[int]
):
    pieces = ["a\nb", f"c\n{STDOUT_MARK}r", "esult\n", "end\n"]
    num_breaks = len(breaks_after)
    server.jobs["job"] = ScriptedJob(
        pieces=pieces, breaks_after=breaks_after, ends="FAILED", exit_code=1
    )
    out, err = io.StringIO(), io.StringIO()
    job = follow(JobServer(server.url), "job", out=out, err=err)
    assert (job.status, job.exit_code) == ("FAILED", 1)
    assert out.getvalue() == "result\n"
    lines = err.getvalue().splitlines()
    said = [line for line in lines if "connection lost" not in line]
    assert len(said) < len(lines)
    assert said == ["a", "bc", "end"]
    # One more after the end, by which it is known to be whole.
    assert server.num_log_connections == num_breaks + 2


def test_a_connection_that_hangs_is_made_anew(
    server: FakeJobServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(following, "QUIET_SECONDS", 0.1)
    job = ScriptedJob(pieces=["a\n"], goes_on=True)
    server.jobs["job"] = job
    asked = JobServer.job

    def ends_at_the_third(self: JobServer, job_id: str):
        job.goes_on = server.num_log_connections < 2
        return asked(self, job_id)

    monkeypatch.setattr(JobServer, "job", ends_at_the_third)
    err = io.StringIO()
    assert follow(JobServer(server.url), "job", out=io.StringIO(), err=err).exit_code == 0
    assert err.getvalue() == "a\n"
    assert server.num_log_connections >= 3


def test_a_job_whose_log_went_with_its_node_ends_all_the_same(server: FakeJobServer):
    server.jobs["job"] = ScriptedJob(
        pieces=["a\n", "b\n"], breaks_after=[1] * 99, status="FAILED", exit_code=None
    )
    err = io.StringIO()
    job = follow(JobServer(server.url), "job", out=io.StringIO(), err=err)
    assert (job.status, job.exit_code) == ("FAILED", None)
    assert err.getvalue().splitlines()[0] == "a"
    assert "the rest of the log can't be read" in err.getvalue().splitlines()[-1]


def test_a_server_that_is_gone_for_long_is_an_error_that_says_how_to_find_the_job(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(following, "LOST_SECONDS", 0.2)
    with fake_job_server() as running:
        running.jobs["job"] = ScriptedJob(goes_on=True)
        server = JobServer(running.url)
    err = io.StringIO()
    with pytest.raises(UnreachableError, match="clipmill jobs attach job"):
        follow(server, "job", out=io.StringIO(), err=err)
    assert err.getvalue().count("connection lost") <= 1  # or none, where the first try took as long


def test_a_job_that_the_server_does_not_know_is_an_error(server: FakeJobServer):
    with pytest.raises(UnknownJobError, match="knows no job other"):
        follow(JobServer(server.url), "other", out=io.StringIO(), err=io.StringIO())
