"""`clipmill jobs` against a job server whose jobs do what the test says."""

from collections.abc import Iterator

import pytest

from jobs import submit, submitted
from jobs.submission.entrypoint import STDOUT_MARK
from tests.commands import Done, command
from tests.job_server import FakeJobServer, ScriptedJob, fake_job_server


@pytest.fixture
def server() -> Iterator[FakeJobServer]:
    with fake_job_server() as running:
        yield running


def jobs(server: FakeJobServer, *words: str) -> Done:
    return command(submitted.main, [*words, "--address", server.url])


def submitted_id(server: FakeJobServer, store: str, job: ScriptedJob) -> str:
    server.coming = [job]
    words = ["embed", "--store", store, "--detach", "--address", server.url]
    return command(submit.main, words).out.strip()


def test_jobs_are_listed_the_newest_first_without_those_of_others(server: FakeJobServer):
    assert "nothing was submitted" in jobs(server, "list").out
    ended = submitted_id(server, "s3://b/one", ScriptedJob(status="FAILED", exit_code=2))
    server.jobs["raysubmit_1"] = ScriptedJob()
    runs = submitted_id(server, "s3://b/two", ScriptedJob(goes_on=True))
    lines = jobs(server, "list").out.splitlines()
    assert [line.split()[:2] for line in lines] == [[runs, "RUNNING"], [ended, "FAILED"]]
    assert lines[1].endswith("2025-06-15 15:06:40 UTC, 60 s   clipmill embed --store s3://b/one")
    listed = jobs(server, "list", "--json").json
    assert [(job["job_id"], job["exit_code"]) for job in listed] == [(runs, None), (ended, 2)]
    assert listed[0]["store"] == "s3://b/two"
    server.jobs["raysubmit_2"] = ScriptedJob(request={"entrypoint": "python a.py --token=hush"})
    assert "python a.py --token=***" in jobs(server, "status", "raysubmit_2").out


def test_the_one_that_runs_is_found_stopped_and_no_more_in_the_way(server: FakeJobServer):
    first = submitted_id(server, "s3://b/one", ScriptedJob(goes_on=True))
    assert jobs(server, "status").out.startswith(f"{first}: RUNNING")
    second = submitted_id(server, "s3://b/two", ScriptedJob(goes_on=True))
    which = jobs(server, "stop")
    assert which.code == 2
    assert first in which.err
    assert second in which.err
    stopped = jobs(server, "stop", first, "--json")
    assert (stopped.code, stopped.json["status"]) == (0, "STOPPED")
    assert jobs(server, "attach", first).code == 1
    # It has ended: nothing is left to be stopped.
    assert jobs(server, "stop", first).code == 0
    assert jobs(server, "status").out.startswith(f"{second}: RUNNING")
    again = submitted_id(server, "s3://b/one", ScriptedJob())
    assert again == first.removesuffix("1") + "2"


def test_an_attached_job_is_shown_from_its_first_line_with_its_exit_code(server: FakeJobServer):
    job = ScriptedJob(pieces=["a\n", f"{STDOUT_MARK}b\n"], ends="FAILED", exit_code=2)
    job_id = submitted_id(server, "s3://b/one", job)
    for _ in range(2):
        done = jobs(server, "attach", job_id)
        assert (done.code, done.out, done.err) == (2, "b\n", "a\n")


def test_an_unknown_job_is_an_error(server: FakeJobServer):
    for action in ("status", "attach", "stop"):
        done = jobs(server, action, "clipmill-nightly-1")
        assert done.code == 1
        assert "knows no job clipmill-nightly-1; `clipmill jobs list`" in done.err
