"""Clients that ask a service again and again over connections that stay open; times each answer.

Knows nothing of what answers, but where it takes queries.
"""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np


@dataclass(slots=True)
class Load:
    """What came of it."""

    statuses: Counter[int] = field(default_factory=Counter)
    """HTTP status -> answers."""
    seconds: list[float] = field(default_factory=list)
    """Of each request that was answered with 200."""
    snapshots: list[int] = field(default_factory=list)
    """That each answer is of."""
    errors: list[str] = field(default_factory=list)
    """Of each request that was not answered, or not with 200."""
    wall_seconds: float = 0.0
    """Of all."""

    @property
    def requests_per_second(self) -> float:
        """Answered with 200."""
        return len(self.seconds) / self.wall_seconds

    def milliseconds(self, percent: float) -> float:
        """A percentile of what such a request took; nan if there was none."""
        return math.nan if not self.seconds else 1e3 * float(np.percentile(self.seconds, percent))

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.requests_per_second:,.0f} requests/s, p50 {self.milliseconds(50):.0f} ms, p99 "
            f"{self.milliseconds(99):.0f} ms, {dict(self.statuses)}, {len(self.errors)} errors"
        )


def load(url: str, texts: Sequence[str], *, seconds: float, num_clients: int = 16) -> Load:
    """POST /search with these texts in turn, by several clients at once."""
    return asyncio.run(_load(url, texts, seconds=seconds, num_clients=num_clients))


async def _load(url: str, texts: Sequence[str], *, seconds: float, num_clients: int) -> Load:
    found = Load()
    started = time.monotonic()
    clients = (
        _client(url, texts[number::num_clients], found, until=started + seconds)
        for number in range(num_clients)
    )
    await asyncio.gather(*clients)
    found.wall_seconds = time.monotonic() - started
    return found


async def _client(url: str, texts: Sequence[str], found: Load, *, until: float) -> None:
    place = urlsplit(url)
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    turn = 0
    while time.monotonic() < until:
        turn += 1
        started = time.monotonic()
        try:
            if connection is None:
                connection = await asyncio.open_connection(place.hostname, place.port)
            status, body = await _ask(*connection, texts[turn % len(texts)], host=place.netloc)
        except (OSError, EOFError, ValueError) as error:
            found.errors.append(repr(error))
            connection = None
            await asyncio.sleep(0.05)
            continue
        found.statuses[status] += 1
        if status == 200:
            found.seconds.append(time.monotonic() - started)
            found.snapshots.append(json.loads(body)["snapshot"])
        else:
            found.errors.append(body.decode(errors="replace")[:300])
            # Ray's proxy closes a connection whose replica died: another request on it is lost too.
            connection[1].close()
            connection = None
    if connection is not None:
        connection[1].close()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str, *, host: str
) -> tuple[int, bytes]:
    body = json.dumps({"query": {"parts": [{"text": text}]}, "k": 10}).encode()
    head = (
        f"POST /search HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(" ", 2)[1])
    if "transfer-encoding: chunked" in head:
        content = b""
        while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
            content += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return status, content
    length = head.split("content-length: ", 1)[1].split("\r\n", 1)[0]
    return status, await reader.readexactly(int(length))
