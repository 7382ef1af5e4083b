"""Follows a job until it ends: its log as it comes, whatever becomes of the connection.

Knows nothing of how it was submitted.
"""

import asyncio
import json
import time
from datetime import datetime
from typing import TextIO

from jobs.submission.entrypoint import STDOUT_MARK
from jobs.submission.server import JobServer, SubmittedJob, UnreachableError

QUIET_SECONDS = 90.0
"""Without a word, three times of a run's own lines, the connection is made anew: it may be gone
without either side knowing."""
LOST_SECONDS = 600.0
"""Without an answer; then the job is left alone."""
_MAX_PAUSE_SECONDS = 15.0
_TRIES_AFTER_END = 3


class LogLines:
    """Parts a log into what the command wrote to stdout and all else, in whole lines."""

    def __init__(self, *, out: TextIO, err: TextIO) -> None:
        """Begin with nothing read."""
        self._out, self._err = out, err
        self._begun = ""
        self.num_characters = 0
        """That were taken."""

    def take(self, text: str) -> None:
        """Write the lines that are whole, keep the rest."""
        self.num_characters += len(text)
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self._write(line)

    def end(self) -> None:
        """Write what was begun."""
        if self._begun:
            self._write(self._begun)
            self._begun = ""

    def _write(self, line: str) -> None:
        if line.startswith(STDOUT_MARK):
            stream, line = self._out, line.removeprefix(STDOUT_MARK)
        else:
            stream, line = self._err, _for_people(line) if self._err.isatty() else line
        stream.write(f"{line}\n")
        stream.flush()


def _for_people(line: str) -> str:
    """An event of a run as a run at a terminal shows it; other lines as they are."""
    try:
        event = json.loads(line)
        at = datetime.fromisoformat(event["time"]).astimezone()
        level = "" if event["level"] == "info" else f"{event['level']}: "
        return f"{at:%H:%M:%S} {level}{event['message']}"
    except (KeyError, TypeError, ValueError):
        return line


def follow(server: JobServer, job_id: str, *, out: TextIO, err: TextIO) -> SubmittedJob:
    """Write a job's log from its first line on until it ends.

    Args:
        server: That knows the job.
        job_id: Of the job.
        out: For what the command writes to stdout.
        err: For all else.

    Returns:
        What the server knows of it then.

    Raises:
        UnreachableError: No answer for `LOST_SECONDS`. The job goes on.
        UnknownJobError: The server knows no such job.
    """
    return asyncio.run(_follow(server, job_id, lines=LogLines(out=out, err=err), err=err))


async def _follow(server: JobServer, job_id: str, *, lines: LogLines, err: TextIO) -> SubmittedJob:
    answered_seconds, pause_seconds, num_tries_after_end = time.monotonic(), 0.0, 0
    while True:
        had = lines.num_characters
        try:
            # Before its log: that of a job that is over is whole.
            job = await asyncio.to_thread(server.job, job_id)
            answered_seconds = time.monotonic()
            num_tries_after_end += job.is_over
            is_whole = await _take_log(server, job_id, lines=lines)
            if job.is_over and (is_whole or num_tries_after_end >= _TRIES_AFTER_END):
                lines.end()
                return job
        except UnreachableError as error:
            if num_tries_after_end >= _TRIES_AFTER_END:
                # It is on the node that the job's driver ran on, which may be gone.
                lines.end()
                print(f"the rest of the log can't be read: {error}", file=err, flush=True)
                return job
            if time.monotonic() - answered_seconds > LOST_SECONDS:
                raise UnreachableError(
                    f"{error}. The job goes on; `clipmill jobs attach {job_id}` finds it again"
                ) from error
            if not pause_seconds:
                print(f"connection lost, trying again: {error}", file=err, flush=True)
        came = lines.num_characters > had
        pause_seconds = 0.0 if came else min(2 * pause_seconds + 0.5, _MAX_PAUSE_SECONDS)
        await asyncio.sleep(pause_seconds)


async def _take_log(server: JobServer, job_id: str, *, lines: LogLines) -> bool:
    """Take what is new until the server ends it, which is True, or nothing comes."""
    to_skip = lines.num_characters
    pieces = server.log(job_id)
    try:
        while True:
            piece = await asyncio.wait_for(anext(pieces), timeout=QUIET_SECONDS)
            new = piece[to_skip:]
            to_skip = max(0, to_skip - len(piece))
            lines.take(new)
    except StopAsyncIteration:
        return True
    except TimeoutError:
        return False
    finally:
        await pieces.aclose()
