"""Fetches one URI by fsspec: a file, or an object of a store, within a policy.

Knows nothing of images, or of HTTP.
"""

import asyncio
import os
import stat
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import cache, partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.fetching.fetch_limits import NoRoomError
from pipelines.fetching.fetch_policy import (
    FILE_SCHEMES,
    FetchError,
    FetchPolicy,
    FetchRefusedError,
    scheme_of,
)

# Between two pieces it is looked whether there is time left.
PIECE_BYTES = 2**20
# At work in a process; more would wait for what does not answer any more.
MAX_THREADS = 128

# Says how many bytes a fetch is to hold, before it does; raises NoRoomError.
Hold = Callable[[int], None]


class Fetch(Protocol):
    """What fetches one URI, in fsspec's loop."""

    def __call__(self, *, hold: Hold) -> Awaitable[bytes]:
        """The content; whatever it raises, the URI gave none."""


def file_fetch(uri: str, *, max_bytes: int, policy: FetchPolicy) -> Fetch:
    """What fetches a URI. To be called in the caller's thread, where clients of stores are made.

    Args:
        uri: Any but http: and https:.
        max_bytes: Reading stops one byte beyond.
        policy: Of what may be fetched.

    Raises:
        FetchRefusedError: It is not allowed.
        Exception: Whatever else fsspec raises.
    """
    scheme = scheme_of(uri)
    if uri.lower().startswith(f"{scheme}:"):
        uri = scheme + uri[len(scheme) :]  # fsspec knows small letters alone
    if scheme in FILE_SCHEMES:
        return partial(_in_thread, partial(_read_file, uri), max_bytes=max_bytes, policy=policy)
    policy.check_scheme(scheme)
    if "::" in uri:
        raise FetchRefusedError("URIs of several schemes (a::b) are not allowed")
    if fsspec.get_filesystem_class(scheme).async_impl:
        fs, path = fsspec.url_to_fs(uri)
        return partial(_read_object, fs, path, max_bytes=max_bytes)
    return partial(_in_thread, partial(_read_other, uri), max_bytes=max_bytes, policy=policy)


async def _read_object(fs: Any, path: str, *, max_bytes: int, hold: Hold) -> bytes:
    """By the coroutines of an object store's client, which end where they are cancelled."""
    info = await fs._info(path)
    if info["type"] != "file":
        raise FetchError(f"{path} is no object, but a {info['type']}")
    size = info.get("size")
    num_bytes = max_bytes + 1 if size is None else min(size, max_bytes + 1)
    if not num_bytes:
        return b""  # of which no store gives a range
    hold(num_bytes)
    content: bytes = await fs._cat_file(path, start=0, end=num_bytes + 1)
    if len(content) > num_bytes == size:
        raise FetchError(f"{path} was replaced while it was read")
    return content[: max_bytes + 1]


class _Threads:
    """Threads that are used again. As daemons, those that are stuck keep no process from ending."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._num_idle = self._num_threads = 0
        self._changing = Lock()

    def begin(self, call: Callable[[], None]) -> None:
        with self._changing:
            is_idle = self._num_idle > 0
            if not is_idle and self._num_threads >= MAX_THREADS:
                raise FetchError(f"{MAX_THREADS} reads of this process do not come back")
            self._num_idle -= is_idle
            self._num_threads += not is_idle
        if is_idle:
            self._calls.put(call)
        else:
            Thread(target=self._work, args=(call,), name="fetch", daemon=True).start()

    def _work(self, call: Callable[[], None] | None) -> None:
        while call is not None:
            call()
            call = None  # which holds what was read
            with self._changing:
                self._num_idle += 1
            call = self._calls.get()


@cache
def _threads(pid: int) -> _Threads:
    """Of this process: a fork has none of them."""
    return _Threads()


class _Read(Protocol):
    def __call__(
        self, *, max_bytes: int, policy: FetchPolicy, hold: Hold, deadline: float
    ) -> bytes: ...


async def _in_thread(read: _Read, *, max_bytes: int, policy: FetchPolicy, hold: Hold) -> bytes:
    """What blocks, in a thread, which is left behind if it takes too long: it ends at a piece."""
    deadline = time.monotonic() + policy.max_seconds
    kept = partial(read, max_bytes=max_bytes, policy=policy, hold=hold, deadline=deadline)
    return await asyncio.wrap_future(_begun(kept))


def _begun(read: Callable[[], bytes]) -> Future[bytes]:
    done: Future[bytes] = Future()
    done.set_running_or_notify_cancel()  # nobody may cancel it, so that it can always be set
    _threads(os.getpid()).begin(partial(_settle, done, read))
    return done


def _settle(done: Future[bytes], read: Callable[[], bytes]) -> None:
    try:
        done.set_result(read())
    except Exception as error:  # noqa: BLE001, raised where it is awaited
        done.set_exception(error)
    finally:
        # Else an error would keep this frame, and that the error: images would stay until garbage
        # is collected.
        del done


def _read_file(
    uri: str, *, max_bytes: int, policy: FetchPolicy, hold: Hold, deadline: float
) -> bytes:
    path = os.path.realpath(LocalFileSystem._strip_protocol(uri))
    policy.check_path(path)
    # A pipe would keep its reader waiting. The path has no links, so one that is there now is new.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FetchError(f"{path} is no file, but a directory, device or pipe")
        return _read(file, size=status.st_size, max_bytes=max_bytes, hold=hold, deadline=deadline)


def _read_other(
    uri: str, *, max_bytes: int, policy: FetchPolicy, hold: Hold, deadline: float
) -> bytes:
    """By a file system that has no coroutines; `policy` was asked before."""
    fs, path = fsspec.url_to_fs(uri)
    with fs.open(path, "rb") as file:
        size = getattr(file, "size", None)
        return _read(file, size=size, max_bytes=max_bytes, hold=hold, deadline=deadline)


def _read(file: Any, *, size: int | None, max_bytes: int, hold: Hold, deadline: float) -> bytes:
    """Read to the end, or one byte beyond the bound: a stream gives what has arrived so far."""
    if time.monotonic() > deadline:
        raise TimeoutError
    end = max_bytes + 1 if size is None else min(size, max_bytes + 1)
    room = min(PIECE_BYTES, end) if size is None else end
    hold(room)
    pieces: list[bytes] = []
    num_read = 0
    while num_read < end:
        if time.monotonic() > deadline:
            raise TimeoutError
        if num_read >= room:
            room = min(2 * num_read, end)
            try:
                hold(room)
            except NoRoomError:  # then with room for a few steps
                raise NoRoomError(min(4 * num_read, end)) from None
        piece = file.read(min(PIECE_BYTES, end - num_read))
        if not piece:
            break
        pieces.append(piece)
        num_read += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
