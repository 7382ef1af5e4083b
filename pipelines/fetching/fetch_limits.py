"""Bounds what the fetches of a batch hold at once, and how long hosts are waited for.

Knows nothing of how anything is fetched.
"""

import asyncio
import threading
from collections import Counter
from contextlib import suppress

# Fetched and not taken yet, of one batch; one image more may be on its way. 320 of 200 kB.
MAX_AHEAD_BYTES = 64 * 2**20
# For a fetch whose size is not known yet; most images are smaller.
FIRST_BYTES = 2**20
# Fetches of a host in a row that took all their time: more than are under way at once, which may
# all fall into one outage.
MAX_UNANSWERED = 48
# How long a batch is waited for: so many times the limit of one fetch, and a second more for each
# of so many bytes that came, lest large images on a slow line count as a host that gives nothing.
BATCH_LIMITS = 10
MIN_BYTES_PER_SECOND = 256 * 2**10


class NoRoomError(Exception):
    """A fetch needs more bytes than are left: it gives up, and begins anew when there are."""

    def __init__(self, num_bytes: int) -> None:
        """`num_bytes`: that it needs in all."""
        super().__init__(f"no room for {num_bytes} bytes yet")
        self.num_bytes = num_bytes


class ByteBudget:
    """What the fetches of a batch hold together; their contents are taken in their order.

    The one whose turn it is has room always: were there only the common bound, all might wait for
    each other. No fetch waits in the midst of an answer, which its server might break off: it is
    begun anew.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, max_bytes: int = MAX_AHEAD_BYTES
    ) -> None:
        """`loop` is that of the fetches."""
        self._loop = loop
        self._left = max_bytes
        self._held: dict[int, int] = {}
        self._turn = 0
        self._changing = threading.Lock()  # files are read in threads
        self._changed = asyncio.Event()

    async def reserve(self, number: int, *, num_bytes: int) -> None:
        """Wait until a fetch that is to begin may hold so many bytes, in place of what it held."""
        self.keep(number, num_bytes=0)
        while True:
            changed = self._changed
            with suppress(NoRoomError):
                self._hold(number, num_bytes)
                return
            await changed.wait()

    def hold(self, number: int, *, num_bytes: int) -> None:
        """Let a fetch that is under way hold so many bytes in all, or as many as it has already.

        In any thread.

        Raises:
            NoRoomError: There are not as many left, or the fetch is over.
        """
        if number not in self._held:
            raise NoRoomError(num_bytes)
        self._hold(number, max(num_bytes, self._held.get(number, 0)))

    def keep(self, number: int, *, num_bytes: int) -> None:
        """A fetch is over, and holds so many bytes until they are taken. In the loop."""
        with self._changing:
            self._left += self._held.pop(number, 0) - num_bytes
            if num_bytes:
                self._held[number] = num_bytes
        self._wake()

    def take(self, number: int) -> None:
        """It is the turn of this one: those before it are taken. In any thread."""
        with self._changing:
            for taken in [held for held in self._held if held < number]:
                self._left += self._held.pop(taken)
            self._turn = number
        self._loop.call_soon_threadsafe(self._wake)

    def _hold(self, number: int, num_bytes: int) -> None:
        with self._changing:
            more = num_bytes - self._held.get(number, 0)
            if more > self._left and number != self._turn:
                raise NoRoomError(num_bytes)
            self._left -= more
            self._held[number] = num_bytes

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Unanswered:
    """Tells which hosts a batch need not ask any more. Used in one loop alone."""

    def __init__(self) -> None:
        """Of a batch that is to begin."""
        self._in_a_row: Counter[str] = Counter()

    def is_lost(self, host: str) -> bool:
        """Whether the last fetches of a host all took their whole time."""
        return self._in_a_row[host] >= MAX_UNANSWERED

    def count(self, host: str) -> None:
        """A fetch of a host took its whole time."""
        self._in_a_row[host] += 1

    def clear(self, host: str) -> None:
        """A host gave an answer, be it an error."""
        self._in_a_row[host] = 0
