"""Ends a run in order when its process is told to end, as Ctrl-C does.

Knows nothing of the run. SIGTERM comes of `clipmill jobs stop`, of schedulers and of nodes that are
taken away; what a process is killed by later cannot be caught.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# By then the finalizer in which the signal was lost is left; if it is amid another, once more.
AGAIN_SECONDS = 0.1


class Terminated(KeyboardInterrupt):
    """This process was told to end."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Raise Terminated in a block of the main thread when SIGTERM comes, once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        # A second one would cut short what the first one began.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told.append(number)
        raise Terminated

    def tell_again(unraisable: "sys.UnraisableHookArgs") -> None:
        # What is raised amid a `__del__` ends that alone.
        if not isinstance(unraisable.exc_value, Terminated):
            show(unraisable)
            return
        signal.signal(signal.SIGTERM, end)
        again = (threading.get_ident(), signal.SIGTERM)
        timers.append(threading.Timer(AGAIN_SECONDS, signal.pthread_kill, again))
        timers[-1].start()

    timers: list[threading.Timer] = []
    show, sys.unraisablehook = sys.unraisablehook, tell_again
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt as error:
        if told and not isinstance(error, Terminated):  # Ray raises a plain one in its place
            raise Terminated from error
        raise
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = show


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Give SIGTERM back at the end of a block to who has taken it: `ray.init` does so, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM:  # so does Ray end a process that it came to
            raise Terminated from error
        raise
    finally:
        if callable(before):
            signal.signal(signal.SIGTERM, before)
