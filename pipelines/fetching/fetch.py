"""Fetches images that a catalog names by URI, each within a policy, a batch within bounds.

Knows nothing of images; a fetch that fails or is refused is a value, not an error of the run.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Literal

from fsspec.asyn import get_loop

from engine.redaction import redacted
from pipelines.fetching.fetch_limits import (
    BATCH_LIMITS,
    FIRST_BYTES,
    MAX_AHEAD_BYTES,
    MAX_UNANSWERED,
    MIN_BYTES_PER_SECOND,
    ByteBudget,
    NoRoomError,
    Unanswered,
)
from pipelines.fetching.fetch_policy import (
    HTTP_SCHEMES,
    FetchError,
    FetchPolicy,
    FetchRefusedError,
    scheme_of,
)
from pipelines.fetching.file_fetch import Fetch, file_fetch
from pipelines.fetching.http_fetch import fetch_http
from pipelines.schema import Reason

NUM_FETCHES = 16  # at once; a fetch waits for the network nearly all its time
_MAX_DETAIL_CHARACTERS = 200
_AFTER_AUTHORITY = re.compile(r"[/?#\\]")


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """Why a URI gave no content."""

    detail: str
    """For a person, one line, without credentials."""
    reason: Literal[Reason.FETCH_FAILED, Reason.FETCH_REFUSED] = Reason.FETCH_FAILED
    """Refused: the policy does not allow it."""


def fetch_all(
    uris: Sequence[bytes], *, max_bytes: int, policy: FetchPolicy
) -> Generator[bytes | FetchFailure]:
    """Fetch several URIs at once; their contents in their order, for who takes one by one.

    However many there are, what is held is bounded (`fetch_limits.MAX_AHEAD_BYTES`, one content
    that is on its way and one that the caller has), and so is the time: a host that lets one fetch
    after the other wait is not asked again, and a batch that was waited for too long fails.

    Args:
        uris: Any that fsspec reads (https:, s3:, gs:, file: ...). UTF-8, unchecked.
        max_bytes: Reading stops one byte beyond; the caller sees that it is too large.
        policy: Of what may be fetched, and in what time.
    """
    batch = _Batch(max_bytes=max_bytes, policy=policy)
    # Popped, so that nothing here keeps what was taken.
    begun = deque(batch.begin(number, uri) for number, uri in enumerate(uris))
    try:
        for number in range(len(begun)):
            yield batch.take(number, begun.popleft())
    finally:
        # Those that wait for a slot first: one that holds a slot hands it to the next as it ends.
        for future in reversed(begun):
            future.cancel()


class _Batch:
    """Fetches that are under way, and their bounds."""

    def __init__(self, *, max_bytes: int, policy: FetchPolicy) -> None:
        self._max_bytes, self._policy = max_bytes, policy
        self._loop = get_loop()
        self._slots = asyncio.Semaphore(NUM_FETCHES)
        self._budget = ByteBudget(self._loop, max_bytes=MAX_AHEAD_BYTES)
        self._unanswered = Unanswered()
        self._seconds_left = BATCH_LIMITS * policy.max_seconds

    def begin(self, number: int, encoded: bytes) -> Future[bytes | FetchFailure]:
        try:
            uri = encoded.decode()
            host, fetch = _host_of(uri), self._fetch_of(uri)
        except UnicodeDecodeError as error:
            return _done(FetchFailure(f"URI is not UTF-8: {error.reason} at {error.start}"))
        # Whatever fsspec makes of a URI: one bad row never stops a run.
        except Exception as error:  # noqa: BLE001
            return _done(_failure(error))
        return asyncio.run_coroutine_threadsafe(self._fetched(number, host, fetch), self._loop)

    def take(self, number: int, future: Future[bytes | FetchFailure]) -> bytes | FetchFailure:
        """Wait for one of them, whose turn it is; what was taken before is the caller's."""
        self._budget.take(number)
        started = time.monotonic()
        try:
            content = future.result(timeout=max(0.0, self._seconds_left))
        except TimeoutError:
            future.cancel()
            self._seconds_left = 0.0
            return self._late()
        if self._seconds_left > 0:
            self._seconds_left -= time.monotonic() - started
            if isinstance(content, bytes):
                self._seconds_left += len(content) / MIN_BYTES_PER_SECOND
        return content

    def _fetch_of(self, uri: str) -> Fetch:
        if scheme_of(uri) in HTTP_SCHEMES:
            return partial(fetch_http, uri, max_bytes=self._max_bytes, policy=self._policy)
        return file_fetch(uri, max_bytes=self._max_bytes, policy=self._policy)

    async def _fetched(self, number: int, host: str, fetch: Fetch) -> bytes | FetchFailure:
        async with self._slots:
            content = await self._tried(number, host, fetch)
            num_bytes = len(content) if isinstance(content, bytes) else 0
            self._budget.keep(number, num_bytes=num_bytes)
            return content

    async def _tried(self, number: int, host: str, fetch: Fetch) -> bytes | FetchFailure:
        num_bytes = min(FIRST_BYTES, self._max_bytes + 1)
        seconds = self._policy.max_seconds
        while True:
            await self._budget.reserve(number, num_bytes=num_bytes)
            if self._seconds_left <= 0:
                return self._late()
            if self._unanswered.is_lost(host):
                return FetchFailure(
                    _line(
                        f"timeout: {MAX_UNANSWERED} fetches in a row from {host} took all their "
                        "time, so that it was not asked again"
                    )
                )
            try:
                async with asyncio.timeout(seconds):
                    content = await fetch(
                        hold=lambda num_bytes: self._budget.hold(number, num_bytes=num_bytes)
                    )
            except NoRoomError as error:
                num_bytes = error.num_bytes
                continue
            except TimeoutError as error:
                self._unanswered.count(host)
                what = str(error) or f"not there after {seconds:g} seconds"
                return FetchFailure(_line(f"timeout: {what}"))
            # Whatever a URI or a server makes libraries raise.
            except Exception as error:  # noqa: BLE001
                self._unanswered.clear(host)
                return _failure(error)
            self._unanswered.clear(host)
            return content

    def _late(self) -> FetchFailure:
        seconds = BATCH_LIMITS * self._policy.max_seconds
        return FetchFailure(
            f"timeout: the images of its batch were waited for more than {seconds:g} seconds"
        )


def _done(failure: FetchFailure) -> Future[bytes | FetchFailure]:
    future: Future[bytes | FetchFailure] = Future()
    future.set_result(failure)
    return future


def _host_of(uri: str) -> str:
    """Who is asked, or the bucket; `file` for files. The URI may be any text."""
    authority = _AFTER_AUTHORITY.split(uri.partition("://")[2], maxsplit=1)[0]
    return authority.rpartition("@")[2].lower() or scheme_of(uri)


def _failure(error: Exception) -> FetchFailure:
    if isinstance(error, FetchRefusedError):
        return FetchFailure(_line(error.detail), Reason.FETCH_REFUSED)
    is_ours = isinstance(error, FetchError)
    return FetchFailure(_line(str(error) if is_ours else f"{type(error).__name__}: {error}"))


def _line(text: str) -> str:
    # A server may say as much as it likes; what is cut off here cannot take long to look through.
    said = redacted(text[: 10 * _MAX_DETAIL_CHARACTERS])
    return (said.splitlines() or [""])[0][:_MAX_DETAIL_CHARACTERS]
