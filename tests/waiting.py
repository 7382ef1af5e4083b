"""Waits of tests for what other threads and processes do."""

import time
from collections.abc import Callable

# For what comes at once on a machine that is not busy.
WAIT_SECONDS = 300.0


def wait_until(condition: Callable[[], object], *, every: float = 0.01) -> None:
    """Return once a condition holds, seen every so many seconds; fails after WAIT_SECONDS."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)
