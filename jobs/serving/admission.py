"""Lets requests in or not, by token, host, number, size and time; and counts them.

Knows nothing of what is asked. Plain ASGI, around the whole app: what is refused costs nothing.
"""

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import unquote

from jobs.serving.metrics import Metrics
from jobs.serving.options import ServiceLimits
from jobs.serving.problems import MEDIA_TYPE, Problem, overloaded, unexpected

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/health", "/ready", "/favicon.svg"})
"""Need no token: they tell nothing of what is stored, and the page asks for the token itself."""
ALWAYS_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Are answered however many requests there are: those who watch are to see that."""
_ITEMS = b"/items/"
_PORT = re.compile(r":[0-9]*$")
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_logger = logging.getLogger("clipmill.serve")


class Admission:
    """Stands before an app."""

    def __init__(
        self,
        app: App,
        *,
        limits: ServiceLimits,
        token: str | None,
        hosts: Collection[str] | None,
        metrics: Metrics,
    ) -> None:
        """Guard an ASGI app.

        Args:
            app: What answers.
            limits: What a request may cost.
            token: That it must carry; None: none.
            hosts: Names that it may ask by, lower case and without a port; None: any.
            metrics: Count the requests.
        """
        self._app = app
        self._limits = limits
        self._token = None if token is None else token.encode()
        self._hosts = None if hosts is None else frozenset(hosts)
        self._metrics = metrics
        self._num_concurrent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # What is between two slashes is a key, which may hold slashes itself.
        raw_path: bytes = scope.get("raw_path") or b""
        if raw_path.startswith(_ITEMS):
            scope = {**scope, "path": raw_path.decode("latin-1")}
        request = _Request(scope, receive, send, max_body_bytes=self._limits.max_body_bytes)
        started = time.monotonic()
        self._num_concurrent += 1
        self._metrics.concurrent.set(self._num_concurrent)
        try:
            await self._answer(request)
        finally:
            self._num_concurrent -= 1
            self._metrics.concurrent.set(self._num_concurrent)
            route = getattr(request.scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, scope["method"], str(request.status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - started)

    async def _answer(self, request: "_Request") -> None:
        try:
            self._check(request)
            async with asyncio.timeout(self._limits.max_seconds):
                await self._app(request.scope, request.receive, request.send)
        except Problem as problem:
            await request.refuse(problem)
        except TimeoutError:
            seconds = f"{self._limits.max_seconds:g} s"
            await request.refuse(
                Problem(
                    504,
                    f"no answer within {seconds}; ask for less at once, or again when fewer ask",
                )
            )
        except Exception:
            _logger.exception("%s %s failed", request.scope["method"], request.scope["path"])
            await request.refuse(unexpected())

    def _check(self, request: "_Request") -> None:
        path = request.scope["path"]
        if self._hosts is not None and path not in OPEN_PATHS:
            host = _PORT.sub("", request.header(b"host").decode("latin-1")).lower()
            if host not in self._hosts:
                raise Problem(
                    403,
                    f"without a token this service answers to {', '.join(sorted(self._hosts))} "
                    f"alone, not to {host[:80]!r}; whoever runs it can give it a token",
                )
        if self._token is not None and path not in OPEN_PATHS:
            scheme, _, given = request.header(b"authorization").partition(b" ")
            is_right = hmac.compare_digest(given.strip(), self._token)
            if scheme.lower() != b"bearer" or not is_right:
                raise Problem(
                    401,
                    "this service wants a token; send it as `Authorization: Bearer TOKEN`",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self._num_concurrent > self._limits.max_concurrent and path not in ALWAYS_PATHS:
            raise overloaded(
                f"{self._limits.max_concurrent} requests are being answered already, as many as "
                "this service may; ask again in a second"
            )
        length = request.header(b"content-length")
        if length.isdigit() and int(length) > self._limits.max_body_bytes:
            raise _too_large(self._limits.max_body_bytes)


class _Request:
    """One request, its body counted as it comes, its answer's status noted as it goes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, max_body_bytes: int) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._num_bytes = 0
        self.status = 499  # as proxies log it: who asked went away
        self._is_begun = False
        self._is_complete = False

    def header(self, name: bytes) -> bytes:
        """A header's value, empty if it is not there."""
        found: dict[bytes, bytes] = dict(self.scope["headers"])
        return found.get(name, b"")

    async def receive(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_begun = True
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *_SECURITY_HEADERS]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._is_complete = True

    async def refuse(self, problem: Problem) -> None:
        """Answer with a problem; what is answered in part already is broken off."""
        if self._is_complete:
            return
        if self._is_begun:
            self.status = problem.status
            raise ConnectionAbortedError(problem.detail)
        body = problem.body
        headers = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            *((name.lower().encode(), value.encode()) for name, value in problem.headers.items()),
        ]
        start = {"type": "http.response.start", "status": problem.status, "headers": headers}
        await self.send(start)
        is_head = self.scope["method"] == "HEAD"
        await self.send({"type": "http.response.body", "body": b"" if is_head else body})


def _too_large(max_body_bytes: int) -> Problem:
    return Problem(
        413,
        f"the request's body is larger than {max_body_bytes:,} bytes; send smaller images or fewer "
        "queries at once",
    )


def item_key(segment: str) -> str:
    """The key in a path as it stands there; Problem 404 if it is not UTF-8."""
    try:
        return unquote(segment, errors="strict")
    except UnicodeDecodeError as error:
        raise Problem(404, f"no such item: the key in the path is not UTF-8 ({error})") from error
