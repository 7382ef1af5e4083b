"""Fetches images that a catalog names by URI, each within a policy.

Knows nothing of images; a fetch that fails or is refused is a value, not an error of the run.
"""

import asyncio
import os
import stat
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
from fsspec.asyn import get_loop, sync
from fsspec.implementations.local import LocalFileSystem

from engine.redaction import redacted
from pipelines.fetch_policy import (
    FILE_SCHEMES,
    HTTP_SCHEMES,
    FetchPolicy,
    FetchRefusedError,
    scheme_of,
)
from pipelines.http_fetch import FetchError, fetch_http
from pipelines.schema import Reason

NUM_FETCHES = 16  # at once; a fetch waits for the network nearly all its time
_MAX_DETAIL_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """Why a URI gave no content."""

    detail: str
    """For a person, one line, without credentials."""
    reason: Literal[Reason.FETCH_FAILED, Reason.FETCH_REFUSED] = Reason.FETCH_FAILED
    """Refused: the policy does not allow it."""


def fetch_all(
    uris: Sequence[bytes], *, max_bytes: int, policy: FetchPolicy
) -> list[bytes | FetchFailure]:
    """Fetch several URIs at once, in their order.

    Args:
        uris: Any that fsspec reads (https:, s3:, gs:, file: ...). UTF-8, unchecked.
        max_bytes: Reading stops one byte beyond; the caller sees that it is too large.
        policy: Of what may be fetched, and in what time.
    """
    contents: dict[int, bytes | FetchFailure] = {}
    by_http: dict[int, str] = {}
    by_others: dict[int, str] = {}
    for number, encoded in enumerate(uris):
        try:
            uri = encoded.decode()
        except UnicodeDecodeError as error:
            detail = f"URI is not UTF-8: {error.reason} at {error.start}"
            contents[number] = FetchFailure(detail)
            continue
        (by_http if scheme_of(uri) in HTTP_SCHEMES else by_others)[number] = uri
    if by_http:
        contents |= sync(get_loop(), _fetch_by_http, by_http, max_bytes=max_bytes, policy=policy)
    if by_others:
        with ThreadPoolExecutor(min(NUM_FETCHES, len(by_others))) as threads:
            found = threads.map(
                lambda uri: _fetch_by_others(uri, max_bytes=max_bytes, policy=policy),
                by_others.values(),
            )
            contents |= zip(by_others, found, strict=True)
    return [contents[number] for number in range(len(uris))]


async def _fetch_by_http(
    uris: Mapping[int, str], *, max_bytes: int, policy: FetchPolicy
) -> dict[int, bytes | FetchFailure]:
    slots = asyncio.Semaphore(NUM_FETCHES)

    async def fetched(uri: str) -> bytes | FetchFailure:
        async with slots:
            try:
                return await fetch_http(uri, max_bytes=max_bytes, policy=policy)
            # Whatever a URI or a server makes libraries raise: one bad row never stops a run.
            except Exception as error:  # noqa: BLE001
                return _failure(error)

    contents = await asyncio.gather(*map(fetched, uris.values()))
    return dict(zip(uris, contents, strict=True))


def _fetch_by_others(uri: str, *, max_bytes: int, policy: FetchPolicy) -> bytes | FetchFailure:
    try:
        scheme = scheme_of(uri)
        if uri.lower().startswith(f"{scheme}:"):
            uri = scheme + uri[len(scheme) :]  # fsspec knows small letters alone
        if scheme in FILE_SCHEMES:
            return _read_file(uri, max_bytes=max_bytes, policy=policy)
        policy.check_scheme(scheme)
        if "::" in uri:
            raise FetchRefusedError("URIs of several schemes (a::b) are not allowed")
        deadline = time.monotonic() + policy.max_seconds
        fs, path = fsspec.url_to_fs(uri)
        with fs.open(path, "rb") as file:
            return _read(file, max_bytes=max_bytes, deadline=deadline)
    # A URI can lead to any of fsspec's file systems, each with exceptions of its own, and one bad
    # row never stops a run.
    except Exception as error:  # noqa: BLE001
        return _failure(error)


def _read_file(uri: str, *, max_bytes: int, policy: FetchPolicy) -> bytes:
    path = os.path.realpath(LocalFileSystem._strip_protocol(uri))
    policy.check_path(path)
    # A pipe would keep its reader waiting. The path has no links, so one that is there now is new.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FetchError(f"{path} is no file, but a directory, device or pipe")
        return _read(file, max_bytes=max_bytes)


def _read(file: Any, *, max_bytes: int, deadline: float | None = None) -> bytes:
    """Read to the end, or one byte beyond the bound: a stream gives what has arrived so far."""
    content = bytearray()
    while len(content) <= max_bytes:
        if deadline is not None and time.monotonic() > deadline:
            raise FetchError("timeout: not there in time")
        chunk = file.read(max_bytes + 1 - len(content))
        if not chunk:
            break
        content += chunk
    return bytes(content)


def _failure(error: Exception) -> FetchFailure:
    if isinstance(error, FetchRefusedError):
        return FetchFailure(_line(error.detail), Reason.FETCH_REFUSED)
    is_ours = isinstance(error, FetchError)
    return FetchFailure(_line(str(error) if is_ours else f"{type(error).__name__}: {error}"))


def _line(text: str) -> str:
    # A server may say as much as it likes; what is cut off here cannot take long to look through.
    said = redacted(text[: 10 * _MAX_DETAIL_CHARACTERS])
    return (said.splitlines() or [""])[0][:_MAX_DETAIL_CHARACTERS]
