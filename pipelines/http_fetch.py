"""Fetches one URI by HTTP, redirects followed by hand, each step within a policy.

Knows nothing of images, or of other schemes.

What is checked of an address is checked where the socket is made that then connects to it: a name
that leads elsewhere a moment later, or to several addresses, gains nothing by it.
"""

import asyncio
import atexit
import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from typing import Any

import aiohttp
from fsspec.asyn import get_loop, sync
from yarl import URL

from pipelines.fetch_policy import HTTP_SCHEMES, FetchPolicy, FetchRefusedError

# Of one image: between two pieces of it, and until a connection stands.
READ_SECONDS = 10.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Compressed, a small answer could become more than memory holds; images are compressed anyway.
_HEADERS = {"Accept-Encoding": "identity"}


class FetchError(Exception):
    """An answer that is no content; the text is for a person."""


@dataclass(frozen=True)
class _Client:
    """Connections that are kept: to hosts at public addresses, and to those that may be at any."""

    public: aiohttp.ClientSession
    trusted: aiohttp.ClientSession

    async def close(self) -> None:
        await self.public.close()
        await self.trusted.close()


# Used in fsspec's loop alone. By process, too: a fork shares no connection.
_clients: dict[tuple[int, FetchPolicy], _Client] = {}


async def fetch_http(uri: str, *, max_bytes: int, policy: FetchPolicy) -> bytes:
    """The content of a URI, to be awaited in fsspec's loop.

    Args:
        uri: http: or https:.
        max_bytes: Reading stops one byte beyond.
        policy: Of what may be fetched.

    Raises:
        FetchRefusedError: It, or what it redirects to, is not allowed.
        FetchError: The server gave no content, or not in time.
        Exception: Whatever else aiohttp raises.
    """
    try:
        async with asyncio.timeout(policy.max_seconds):
            return await _fetch(URL(uri), max_bytes=max_bytes, policy=policy)
    except TimeoutError as error:
        what = str(error) or f"not there after {policy.max_seconds:g} seconds"
        raise FetchError(f"timeout: {what}") from error
    except aiohttp.ClientConnectorError as error:
        # Several addresses that were refused come as one error with their common number. Of those
        # of certificates there is no such error.
        os_error = getattr(error, "os_error", None)
        if isinstance(os_error, OSError) and os_error.errno == errno.EACCES:
            raise FetchRefusedError(f"host {error.host}: {os_error.strerror}") from error
        raise


async def _fetch(url: URL, *, max_bytes: int, policy: FetchPolicy) -> bytes:
    client = _client(policy)
    for _ in range(policy.max_redirects + 1):
        if url.scheme not in HTTP_SCHEMES:
            raise FetchRefusedError(f"a redirect to {url.scheme}: is not followed")
        host = url.raw_host or ""
        policy.check_host(host)
        session = client.trusted if policy.trusts(host) else client.public
        async with session.get(url, headers=_HEADERS, allow_redirects=False) as response:
            if response.status in _REDIRECTS:
                url = url.join(URL(response.headers.get("Location", "")))
                continue
            if response.status != 200:
                raise FetchError(f"HTTP {response.status} {response.reason}")
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise FetchError(f"the server compressed it ({encoding}), unasked")
            return await _read(response.content, max_bytes=max_bytes)
    raise FetchError(f"more than {policy.max_redirects} redirects")


async def _read(stream: aiohttp.StreamReader, *, max_bytes: int) -> bytes:
    """Read to the end, or one byte beyond the bound: a stream gives what has arrived so far."""
    content = bytearray()
    while len(content) <= max_bytes:
        chunk = await stream.read(max_bytes + 1 - len(content))
        if not chunk:
            break
        content += chunk
    return bytes(content)


def _client(policy: FetchPolicy) -> _Client:
    """Its sessions, which live as long as this process."""
    key = (os.getpid(), policy)
    if key not in _clients:

        def checked_socket(address: aiohttp.AddrInfoType) -> socket.socket:
            family, kind, protocol, _, place = address
            policy.check_address(str(place[0]))
            return socket.socket(family, kind, protocol)

        client = _Client(public=_session(checked_socket), trusted=_session(None))
        _clients[key] = client
        atexit.register(_close, client, loop=get_loop(), pid=os.getpid())
    return _clients[key]


def _session(socket_factory: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(socket_factory=socket_factory),
        cookie_jar=aiohttp.DummyCookieJar(),  # what one row's server says is not told another's
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=READ_SECONDS, sock_read=READ_SECONDS
        ),
        auto_decompress=False,
        trust_env=False,
    )


def _close(client: _Client, *, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    if pid == os.getpid() and loop.is_running():
        with contextlib.suppress(Exception):
            sync(loop, client.close, timeout=1)
