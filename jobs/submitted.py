"""`clipmill jobs`: finds what was submitted, follows it again, stops it.

Knows nothing of how it was submitted.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from engine.errors import ClipmillError
from jobs.command import CommandParser, dispatch, print_result, run, say
from jobs.submission.server import JobServer, SubmittedJob
from jobs.submit import add_address, attach, job_server_address

STOP_SECONDS = 60.0
"""Ray kills a driver that does not end by itself within half of it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action that the first word names; returns its exit code."""
    return dispatch("jobs", ACTIONS, argv)


def _list(argv: Sequence[str]) -> int:
    parser = CommandParser("jobs list", description="All that was submitted, the newest first.")
    add_address(parser)
    options = parser.parse_options(argv)
    jobs = _server(options).jobs()
    lines = [_line(job) for job in jobs] or ["nothing was submitted; `clipmill submit` does"]
    print_result(jobs, as_json=options.json, text="\n".join(lines))
    return 0


def _status(argv: Sequence[str]) -> int:
    options = _parser("status", description="One job: how it is, or how it ended.")(argv)
    job = _job(_server(options), options.job_id)
    print_result(job, as_json=options.json, text=_text(job))
    return 0


def _attach(argv: Sequence[str]) -> int:
    description = "Follow a job, from its first line; exits as its command does."
    options = _parser("attach", description=description)(argv)
    server = _server(options)
    return attach(server, _job(server, options.job_id).job_id)


def _stop(argv: Sequence[str]) -> int:
    description = "End a job. What it did is kept; submitted again, it goes on."
    options = _parser("stop", description=description)(argv)
    server = _server(options)
    job = _job(server, options.job_id)
    if not job.is_over:
        server.stop(job.job_id)
        say(f"stopping {job.job_id}")
    deadline = time.monotonic() + STOP_SECONDS
    while not job.is_over:
        if time.monotonic() > deadline:
            raise ClipmillError(
                f"{job.job_id} is still {job.status} after {STOP_SECONDS:.0f} s; "
                f"`clipmill jobs status {job.job_id}` says more later"
            )
        time.sleep(0.5)
        job = server.job(job.job_id)
    print_result(job, as_json=options.json, text=_text(job))
    return 0


ACTIONS: Mapping[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "list": (_list, "all that was submitted, the newest first"),
    "status": (_status, "how a job is, or how it ended"),
    "attach": (_attach, "follow it again, from its first line"),
    "stop": (_stop, "end it; submitted again, it goes on"),
}


def _parser(action: str, *, description: str) -> Callable[[Sequence[str]], Namespace]:
    parser = CommandParser(f"jobs {action}", description=description)
    parser.add_argument(
        "job_id", nargs="?", metavar="ID", help="of the job; if left out the one that runs"
    )
    add_address(parser)
    return parser.parse_options


def _server(options: Namespace) -> JobServer:
    return JobServer(job_server_address(options.address))


def _job(server: JobServer, job_id: str | None) -> SubmittedJob:
    if job_id is not None:
        return server.job(job_id)
    running = [job for job in server.jobs() if not job.is_over]
    if len(running) == 1:
        return running[0]
    which = ", ".join(job.job_id for job in running) or "none"
    raise ValueError(f"ID: say which job; running: {which}; `clipmill jobs list` shows all")


def _line(job: SubmittedJob) -> str:
    return f"{job.job_id}  {job.status:<9}  {_times(job):<30}  {job.command}"


def _text(job: SubmittedJob) -> str:
    lines = [f"{job.job_id}: {job.status}", f"  {_times(job)}", f"  {job.command}"]
    if job.exit_code is not None:
        lines.append(f"  exit code {job.exit_code}")
    if job.message:
        lines.append(f"  {job.message.strip().splitlines()[-1]}")
    return "\n".join(lines)


def _times(job: SubmittedJob) -> str:
    if job.started_at is None:
        return "not yet started"
    started = datetime.fromisoformat(job.started_at)
    ended = datetime.fromisoformat(job.ended_at) if job.ended_at else datetime.now(UTC)
    return f"{started:%Y-%m-%d %H:%M:%S} UTC, {(ended - started).total_seconds():,.0f} s"


if __name__ == "__main__":
    run(main, sys.argv[1:])
