"""Turns of threads: many go together, or one goes alone.

Knows nothing of what they do.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Who wants to go alone goes first: it waits for those under way, and lets no other begin."""

    def __init__(self) -> None:
        """Nobody goes yet."""
        self._changed = threading.Condition()
        self._num_together = 0
        # Until they are through, so that nobody begins beside them.
        self._num_for_alone = 0
        self._one_alone = threading.Lock()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Go beside others within the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_for_alone == 0)
            self._num_together += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Go alone within the block."""
        with self._changed:
            self._num_for_alone += 1
        try:
            with self._one_alone:
                with self._changed:
                    self._changed.wait_for(lambda: self._num_together == 0)
                yield
        finally:
            with self._changed:
                self._num_for_alone -= 1
                self._changed.notify_all()
