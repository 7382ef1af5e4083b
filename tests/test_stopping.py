"""Tests of jobs/stopping.py: SIGTERM in this process, as a scheduler would send it."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from jobs.stopping import Terminated, ended_by_sigterm, sigterm_kept
from tests.commands import command
from tests.waiting import WAIT_SECONDS


def told_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def noticed() -> list[int]:
    """Signals that came to what was there before."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_a_block_ends_as_by_ctrl_c_and_all_is_as_before(noticed: list[int]):
    def run() -> None:
        with ended_by_sigterm():
            try:
                told_to_end()
            finally:
                told_to_end()  # what ends a run is not ended itself

    with pytest.raises(Terminated):
        run()
    assert noticed == []
    told_to_end()
    assert noticed == [signal.SIGTERM]


class Finalized:
    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def __del__(self) -> None:
        self._act()


def wait() -> None:
    threading.Event().wait(WAIT_SECONDS)


def test_what_comes_amid_a_finalizer_which_nothing_ends_is_told_again():
    def run() -> None:
        with ended_by_sigterm():
            Finalized(told_to_end)
            Finalized(wait)
            wait()

    hook = sys.unraisablehook
    with pytest.raises(Terminated):
        run()
    assert sys.unraisablehook is hook


def test_other_errors_of_finalizers_are_shown_as_before(monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(unraisable.exc_type))
    with ended_by_sigterm():
        Finalized([].pop)
    assert shown == [IndexError]


def test_who_has_the_signal_keeps_it_though_ray_takes_it(noticed: list[int]):
    def run() -> None:
        with ended_by_sigterm():
            with sigterm_kept():
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init
            told_to_end()

    with pytest.raises(Terminated):
        run()
    assert noticed == []


def test_who_is_told_to_end_while_ray_starts_is_told_so():
    def run(*, code: int) -> None:
        with ended_by_sigterm(), sigterm_kept():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))  # as ray.init
            told_to_end()

    with pytest.raises(Terminated):
        run(code=signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(code=3)


def test_where_nobody_has_it_who_takes_it_keeps_it():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    taken: list[int] = []
    with sigterm_kept():
        signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
    told_to_end()
    assert taken == [signal.SIGTERM]


def test_a_plain_interrupt_that_ray_makes_of_it_is_told_from_ctrl_c():
    def run(*, is_told: bool) -> None:
        with ended_by_sigterm():
            with suppress(Terminated):
                if is_told:
                    told_to_end()
            raise KeyboardInterrupt

    with pytest.raises(Terminated):
        run(is_told=True)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(is_told=False)
    assert not isinstance(caught.value, Terminated)


def test_in_another_thread_nothing_is_changed(noticed: list[int]):
    ended: list[bool] = []

    def run() -> None:
        with ended_by_sigterm():
            ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [True]


@pytest.mark.parametrize(("error", "code"), [(Terminated, 143), (KeyboardInterrupt, 130)])
def test_the_exit_code_is_a_shells(error: type[BaseException], code: int):
    def main(argv: object) -> int:
        raise error

    done = command(main, [])
    assert (done.code, done.err) == (
        code,
        "clipmill: stopped; run the same command again to go on\n",
    )
