"""Threads that go together, and those that go alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest

from pipelines.resilience.turns import Turns
from tests.waiting import WAIT_SECONDS, wait_until


class Thread:
    """One that takes a turn when it may, and keeps it until it is let go."""

    def __init__(self, pool: ThreadPoolExecutor, turn: AbstractContextManager[None]) -> None:
        self.begun, self.let_go = threading.Event(), threading.Event()
        self._done = pool.submit(self._go, turn)

    def _go(self, turn: AbstractContextManager[None]) -> None:
        with turn:
            self.begun.set()
            assert self.let_go.wait(WAIT_SECONDS)

    def end(self) -> None:
        self.let_go.set()
        self._done.result(WAIT_SECONDS)


@pytest.fixture
def start():
    """Gives the turns, and starts threads that take one."""
    turns = Turns()
    with ThreadPoolExecutor(8) as pool:
        yield turns, lambda turn: Thread(pool, turn)


def test_many_go_together(start: Any):
    turns, thread = start
    both = [thread(turns.together()) for _ in range(2)]
    for one in both:
        assert one.begun.wait(WAIT_SECONDS)
    for one in both:
        one.end()


def test_who_goes_alone_waits_for_those_under_way_and_goes_before_all_others(start: Any):
    turns, thread = start
    under_way = thread(turns.together())
    assert under_way.begun.wait(WAIT_SECONDS)
    alone = thread(turns.alone())
    wait_until(lambda: turns._num_for_alone == 1)
    assert not alone.begun.wait(0.1)
    later = thread(turns.together())
    under_way.end()
    assert alone.begun.wait(WAIT_SECONDS)
    also_alone = thread(turns.alone())
    wait_until(lambda: turns._num_for_alone == 2)
    assert not also_alone.begun.wait(0.1)
    assert not later.begun.is_set()
    alone.end()
    assert also_alone.begun.wait(WAIT_SECONDS)
    assert not later.begun.wait(0.1)
    also_alone.end()
    assert later.begun.wait(WAIT_SECONDS)
    later.end()


@pytest.mark.parametrize("first", ["together", "alone"])
@pytest.mark.parametrize("second", ["together", "alone"])
def test_a_turn_that_fails_is_over(start: Any, first: str, second: str):
    turns, thread = start
    with pytest.raises(ValueError, match="no"), getattr(turns, first)():
        raise ValueError("no")
    after = thread(getattr(turns, second)())
    assert after.begun.wait(WAIT_SECONDS)
    after.end()
