"""Ends a run in order when its process is told to end, as Ctrl-C does.

Knows nothing of the run. SIGTERM comes of `clipmill jobs stop`, of schedulers and of nodes that are
taken away; what a process is killed by later cannot be caught.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """This process was told to end."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Raise Terminated in a block of the main thread when SIGTERM comes, once.

    Ray takes the signal as it starts: then it ends the process by SystemExit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    # A second one would cut short what the first one began.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
