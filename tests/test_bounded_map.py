"""Tests of pipelines/bounded_map.py."""

import threading
from collections.abc import Iterator

import pytest

from pipelines.bounded_map import bounded_map
from tests.waiting import WAIT_SECONDS


def test_results_come_in_the_order_of_their_values():
    first_may_end = threading.Event()

    def square(value: int) -> int:
        if value == 0:
            assert first_may_end.wait(WAIT_SECONDS)
        if value == 2:
            first_may_end.set()
        return value**2

    assert list(bounded_map(square, range(10), num_threads=3)) == [n**2 for n in range(10)]
    assert list(bounded_map(square, [], num_threads=3)) == []


def test_no_more_values_are_taken_than_there_are_threads_for():
    taken: list[int] = []

    def values() -> Iterator[int]:
        for value in range(100):
            taken.append(value)
            yield value

    results = bounded_map(str, values(), num_threads=4)
    assert taken == []
    for number, result in enumerate(results):
        assert result == str(number)
        assert len(taken) <= number + 4


def test_what_the_function_raises_is_raised():
    def bad(value: int) -> int:
        return 1 // (value - 2)

    results = bounded_map(bad, range(9), num_threads=2)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
