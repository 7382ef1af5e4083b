"""Fetches one URI by HTTP, redirects followed by hand, each step within a policy.

Knows nothing of images, or of other schemes.

What is checked of an address is checked where the socket is made that then connects to it: a name
that leads elsewhere a moment later, or to several addresses, gains nothing by it.
"""

import asyncio
import atexit
import contextlib
import os
import socket
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from fsspec.asyn import get_loop, sync
from yarl import URL

from pipelines.fetching.fetch_limits import FIRST_BYTES, NoRoomError
from pipelines.fetching.fetch_policy import HTTP_SCHEMES, FetchError, FetchPolicy, FetchRefusedError
from pipelines.fetching.file_fetch import Hold

# Of one image: between two pieces of it, and until a connection stands.
READ_SECONDS = 10.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Compressed, a small answer could become more than memory holds; images are compressed anyway.
_HEADERS = {"Accept-Encoding": "identity"}


@dataclass(frozen=True)
class _Client:
    """Connections that are kept: to hosts at public addresses, and to those that may be at any."""

    public: aiohttp.ClientSession
    trusted: aiohttp.ClientSession

    async def close(self) -> None:
        await self.public.close()
        await self.trusted.close()


@dataclass(slots=True)
class _Addresses:
    """Those that were to be connected to for one step of a fetch."""

    refused: list[FetchRefusedError] = field(default_factory=list)
    num_allowed: int = 0


# Used in fsspec's loop alone. By process, too: a fork shares no connection.
_clients: dict[tuple[int, FetchPolicy], _Client] = {}
# A socket that is refused reaches us as an error of the connection, or of several put together.
_addresses: ContextVar[_Addresses] = ContextVar("_addresses")


async def fetch_http(uri: str, *, max_bytes: int, policy: FetchPolicy, hold: Hold) -> bytes:
    """The content of a URI, to be awaited in fsspec's loop, and cancelled when its time is over.

    Args:
        uri: http: or https:.
        max_bytes: Reading stops one byte beyond.
        policy: Of what may be fetched.
        hold: Told what is to be held beyond `FIRST_BYTES`.

    Raises:
        FetchRefusedError: It, or what it redirects to, is not allowed.
        FetchError: The server gave no content.
        TimeoutError: It does not connect, or pauses for too long.
        Exception: Whatever else aiohttp raises.
    """
    url = URL(uri)
    client = _client(policy)
    for _ in range(policy.max_redirects + 1):
        if url.scheme not in HTTP_SCHEMES:
            raise FetchRefusedError(f"a redirect to {url.scheme}: is not followed")
        host = url.raw_host or ""
        policy.check_host(host)
        session = client.trusted if policy.trusts(host) else client.public
        async with await _answer(session, url) as response:
            if response.status in _REDIRECTS:
                url = url.join(URL(response.headers.get("Location", "")))
                continue
            if response.status != 200:
                raise FetchError(f"HTTP {response.status} {response.reason}")
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise FetchError(f"the server compressed it ({encoding}), unasked")
            return await _read(response, max_bytes=max_bytes, hold=hold)
    raise FetchError(f"more than {policy.max_redirects} redirects")


async def _answer(session: aiohttp.ClientSession, url: URL) -> aiohttp.ClientResponse:
    tried = _Addresses()
    _addresses.set(tried)
    try:
        return await session.get(url, headers=_HEADERS, allow_redirects=False)
    except aiohttp.ClientConnectorError as error:
        # One that was allowed and did not answer is no refusal, whatever the system calls it.
        if tried.refused and not tried.num_allowed:
            detail = f"host {error.host}: {tried.refused[0].detail}"
            raise FetchRefusedError(detail) from error
        raise


async def _read(response: aiohttp.ClientResponse, *, max_bytes: int, hold: Hold) -> bytes:
    """Read to the end, or one byte beyond the bound: a stream gives what has arrived so far."""
    room = FIRST_BYTES
    if (length := response.content_length or 0) > room:
        room = min(length, max_bytes + 1)
        hold(room)
    content = bytearray()
    while len(content) <= max_bytes:
        chunk = await response.content.read(max_bytes + 1 - len(content))
        if not chunk:
            break
        content += chunk
        if len(content) > room:  # of a length that the server did not say
            room = min(2 * len(content), max_bytes + 1)
            try:
                hold(room)
            except NoRoomError:  # then with room for a few steps
                raise NoRoomError(min(4 * len(content), max_bytes + 1)) from None
    return bytes(content)


def _client(policy: FetchPolicy) -> _Client:
    """Its sessions, which live as long as this process."""
    key = (os.getpid(), policy)
    if key not in _clients:

        def checked_socket(address: aiohttp.AddrInfoType) -> socket.socket:
            family, kind, protocol, _, place = address
            try:
                policy.check_address(str(place[0]))
            except FetchRefusedError as error:
                _addresses.get().refused.append(error)
                raise
            _addresses.get().num_allowed += 1
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
