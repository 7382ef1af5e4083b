"""Ray's job server: what it knows of submitted commands, asked over HTTP.

Knows nothing of files or terminals. Each failure is an error that says what to do.
"""

import json
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from engine.errors import ClipmillError
from engine.redaction import public_uri, redacted
from jobs.submission.naming import target_of
from jobs.submission.words import CommandWords

ENTRYPOINT = "python -m jobs.submission.entrypoint"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""That may name the server, in Ray's order."""
# To connect, and for an answer: the server itself waits for a node to start a job on.
REQUEST_SECONDS = (10.0, 120.0)
# For a driver that is stopped to end what it began; what it tells last leaves it within 10 s.
STOP_VARIABLE, STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S", 30
_KEY = "clipmill_"


class UnreachableError(ClipmillError):
    """The job server does not answer, or not as one."""


class UnknownJobError(ClipmillError):
    """The job server knows no such job."""


class TakenIdError(ClipmillError):
    """A job of that id was submitted meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmittedJob:
    """What the server knows of a job; JSON-able."""

    job_id: str
    """Its submission id."""
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    command: str
    """As it was submitted, without secrets."""
    target: str | None
    """What no other job may work on meanwhile; None if Clipmill did not submit it."""
    store: str | None
    """Without secrets."""
    catalog: str | None
    """Without secrets."""
    started_at: str | None
    """ISO 8601, in UTC; None before it has."""
    ended_at: str | None
    """The same; None while it runs."""
    exit_code: int | None
    """Of the command; None while it runs, or if it was not it that ended."""
    message: str
    """What Ray says of the status, without secrets."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return JobStatus(self.status).is_terminal()


@dataclass(frozen=True, kw_only=True, slots=True)
class EntrypointResources:
    """What the job's driver reserves; with nothing it runs on the head."""

    num_cpus: float = 0
    num_gpus: float = 0
    memory_bytes: int = 0
    resources: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Refuse what is less than nothing."""
        for name in ("num_cpus", "num_gpus", "memory_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, is {getattr(self, name)}")


class _Client(JobSubmissionClient):
    def _do_request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Ray's waits for ever."""
        return super()._do_request(*args, timeout=REQUEST_SECONDS, **kwargs)


class JobServer:
    """The job server at an address."""

    def __init__(self, address: str) -> None:
        """Ask whether it is there."""
        self.address, headers = _without_userinfo(address.rstrip("/"), headers=_headers())
        # It says each upload.
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)
        with self._answers(), _said_to_ray(self.address):
            self._client = _Client(self.address, headers=headers)

    def jobs(self) -> list[SubmittedJob]:
        """All that were submitted by Clipmill, the newest first."""
        with self._answers():
            found = [_submitted(job) for job in self._client.list_jobs() if job.submission_id]
        ours = [job for job in found if job.target is not None]
        return sorted(ours, key=lambda job: (job.started_at or "", job.job_id), reverse=True)

    def ids(self) -> list[str]:
        """Of all jobs, whoever submitted them."""
        with self._answers():
            return [job.submission_id for job in self._client.list_jobs() if job.submission_id]

    def job(self, job_id: str) -> SubmittedJob:
        """One of them; UnknownJobError if there is none."""
        with self._answers(job_id):
            return _submitted(self._client.get_job_info(job_id))

    def submit(
        self,
        command: CommandWords,
        *,
        job_id: str,
        folder: Path,
        env_vars: Mapping[str, str],
        entrypoint: EntrypointResources,
    ) -> None:
        """Submit a packed command; TakenIdError if there is a job of that id."""
        metadata = {
            "command": command.shown,
            "target": target_of(command),
            "store": public_uri(command.value("store") or ""),
            "catalog": public_uri(command.value("catalog") or ""),
        }
        with self._answers(job_id):
            self._client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=job_id,
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {STOP_VARIABLE: str(STOP_SECONDS), **env_vars},
                },
                metadata={f"{_KEY}{name}": text for name, text in metadata.items()},
                entrypoint_num_cpus=entrypoint.num_cpus or None,
                entrypoint_num_gpus=entrypoint.num_gpus or None,
                entrypoint_memory=entrypoint.memory_bytes or None,
                entrypoint_resources=dict(entrypoint.resources) if entrypoint.resources else None,
            )

    def stop(self, job_id: str) -> None:
        """Ask a job to end."""
        with self._answers(job_id):
            self._client.stop_job(job_id)

    async def log(self, job_id: str) -> AsyncGenerator[str, None]:
        """Pieces of its log, from the first line on, as it comes; ends with the job."""
        with self._answers(job_id):
            async for piece in self._client.tail_job_logs(job_id):
                yield piece

    @contextmanager
    def _answers(self, job_id: str = "") -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ClipmillError(f"{self.address}: {error}") from error
        except (OSError, requests.RequestException, aiohttp.ClientError) as error:
            raise UnreachableError(
                f"no job server of Ray answers at {self.address} ({_first_line(error)}); check the "
                "address (the head's dashboard, port 8265) and that this machine may reach it "
                "(`ray dashboard cluster.yaml` forwards it)"
            ) from error
        except RuntimeError as error:
            if "already exists" in str(error):
                raise TakenIdError(f"job {job_id} was submitted meanwhile") from error
            if "status code 404" in str(error) and job_id:
                raise UnknownJobError(
                    f"{self.address} knows no job {job_id}; `clipmill jobs list` shows those it "
                    "knows. If the head was started anew, submit again: it goes on where it stopped"
                ) from error
            raise UnreachableError(
                f"the job server at {self.address} failed: {_last_line(error)}"
            ) from error


def _headers() -> dict[str, str] | None:
    """That a proxy before the server asks for; in the variable that Ray's own command reads."""
    text = os.environ.get("RAY_JOB_HEADERS")
    if text is None:
        return None
    try:
        headers = json.loads(text)
    except json.JSONDecodeError:
        headers = None
    if not isinstance(headers, dict):
        raise ValueError("$RAY_JOB_HEADERS must be a JSON object: each header's name and its value")
    return headers


def _without_userinfo(
    address: str, *, headers: dict[str, str] | None
) -> tuple[str, dict[str, str] | None]:
    """An address whose user and password are a header: beside a URI's, Ray's token is refused."""
    parts = urlsplit(address)
    if parts.username is None:
        return address, headers
    user, password = unquote(parts.username), unquote(parts.password or "")
    authority = parts.netloc.rpartition("@")[2]
    basic = {"Authorization": aiohttp.encode_basic_auth(user, password)}
    return urlunsplit(parts._replace(netloc=authority)), {**basic, **(headers or {})}


@contextmanager
def _said_to_ray(address: str) -> Iterator[None]:
    """Ray's client takes variables before its argument, and this one before $RAY_ADDRESS."""
    before = os.environ.get(ADDRESS_VARIABLES[0])
    os.environ[ADDRESS_VARIABLES[0]] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_VARIABLES[0]]
        else:
            os.environ[ADDRESS_VARIABLES[0]] = before


def _submitted(job: JobDetails) -> SubmittedJob:
    metadata = job.metadata or {}
    return SubmittedJob(
        job_id=job.submission_id or "",
        status=str(job.status),
        command=redacted(metadata.get(f"{_KEY}command", job.entrypoint) or ""),
        target=metadata.get(f"{_KEY}target"),
        store=metadata.get(f"{_KEY}store") or None,
        catalog=metadata.get(f"{_KEY}catalog") or None,
        started_at=_time(job.start_time),
        ended_at=_time(job.end_time),
        exit_code=job.driver_exit_code,
        message=redacted(job.message or ""),
    )


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
