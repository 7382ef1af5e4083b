"""Batches through slots and streams, on a GPU that is made up: order, overlap and ends of runs."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.backends.overlap import Pipeline, Slot
from engine.device import Device
from engine.errors import DeviceError, DeviceMemoryError
from engine.plans.plan import Shape
from tests.fake_gpu import FakeCuda

MAX_ROWS, WIDTH = 4, 3


class Squares:
    """A pipeline that squares int32 [rows, WIDTH]."""

    def __init__(self, cuda: FakeCuda, *, num_slots: int = 3) -> None:
        self.cuda = cuda
        self.resources = ExitStack()
        self.pipeline = Pipeline(
            Device(cuda),
            num_slots=num_slots,
            input_bytes=MAX_ROWS * WIDTH * 4,
            output_bytes=MAX_ROWS * WIDTH * 4,
            resources=self.resources,
        )
        self.resources.callback(self.pipeline.close)
        self.fails_with: Exception | None = None

    def run(self, batches: Iterable[np.ndarray]) -> Iterator[list[list[int]]]:
        for result in self.pipeline.run(batches, self.compute):
            yield result.view(np.int32).reshape(-1, WIDTH).tolist()

    def compute(self, slot: Slot, shape: Shape) -> int:
        if self.fails_with is not None:
            raise self.fails_with

        def square() -> None:
            source = self.cuda.array(slot.device_input, np.int32, shape)
            self.cuda.array(slot.device_output, np.int32, shape)[:] = source * source

        self.cuda.enqueue(int(self.pipeline.stream), square)
        return shape[0] * WIDTH * 4


def batch(number: int, *, num_rows: int = MAX_ROWS) -> np.ndarray:
    first = 100 * number
    return np.arange(first, first + num_rows * WIDTH, dtype=np.int32).reshape(num_rows, WIDTH)


@given(
    num_rows=st.lists(st.integers(1, MAX_ROWS), max_size=12),
    num_slots=st.integers(1, 4),
    schedule=st.sampled_from(["late", "early", "random"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200)
def test_results_in_order_whatever_the_gpu_does_first(
    num_rows: list[int], num_slots: int, schedule: Any, seed: int
) -> None:
    cuda = FakeCuda(schedule=schedule, seed=seed)
    squares = Squares(cuda, num_slots=num_slots)
    batches = [batch(number, num_rows=rows) for number, rows in enumerate(num_rows)]
    for _ in range(2):
        assert list(squares.run(batches)) == [(each * each).tolist() for each in batches]
    squares.resources.close()
    assert cuda.live() == {}


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_as_many_batches_under_way_as_slots(num_slots: int) -> None:
    cuda = FakeCuda()
    taken: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        for number in range(6):
            taken.append(number)
            yield batch(number)

    results = Squares(cuda, num_slots=num_slots).run(batches())
    next(results)
    # The next is at hand before the first result is waited for.
    assert taken == list(range(num_slots + 1))
    assert cuda.calls["cudaEventSynchronize"] == 1
    assert len(list(results)) == 5


def test_a_result_is_the_callers() -> None:
    squares = Squares(FakeCuda())
    results = list(squares.pipeline.run([batch(number) for number in range(7)], squares.compute))
    for number, result in enumerate(results):
        assert result.view(np.int32).tolist() == (batch(number) ** 2).ravel().tolist()


def test_batches_need_not_be_contiguous() -> None:
    whole = np.arange(48, dtype=np.int32).reshape(MAX_ROWS, 12)
    part = whole[:, ::4]
    assert list(Squares(FakeCuda()).run([part])) == [(part * part).tolist()]


def test_an_abandoned_run_is_waited_for() -> None:
    cuda = FakeCuda()
    squares = Squares(cuda)
    abandoned = squares.run(batch(number) for number in range(9))
    next(abandoned)
    assert not cuda.is_idle()

    def batches() -> Iterator[np.ndarray]:
        assert cuda.is_idle()
        yield batch(50)

    assert list(squares.run(batches())) == [(batch(50) ** 2).tolist()]
    with pytest.raises(RuntimeError, match="another run has begun"):
        next(abandoned)


def test_an_error_between_batches_does_no_harm() -> None:
    def batches() -> Iterator[np.ndarray]:
        yield batch(1)
        yield batch(2)
        raise OSError("the disk is gone")

    squares = Squares(FakeCuda())
    with pytest.raises(OSError, match="the disk is gone"):
        list(squares.run(batches()))
    assert list(squares.run([batch(3)])) == [(batch(3) ** 2).tolist()]


def test_closed_in_the_middle_of_a_run() -> None:
    cuda = FakeCuda()
    squares = Squares(cuda)
    results = squares.run(batch(number) for number in range(9))
    next(results)
    squares.resources.close()
    assert cuda.live() == {}
    with pytest.raises(RuntimeError, match="it was closed"):
        next(results)
    with pytest.raises(DeviceError, match="this encoder is closed"):
        list(squares.run([batch(1)]))


def test_a_failure_is_remembered() -> None:
    squares = Squares(FakeCuda())
    squares.fails_with = DeviceError("a kernel failed")
    with pytest.raises(DeviceError, match=r"^a kernel failed$"):
        list(squares.run([batch(1)]))
    squares.fails_with = None
    with pytest.raises(DeviceError, match=r"is of no more use, .*: a kernel failed"):
        list(squares.run([batch(1)]))


def test_a_lack_of_memory_is_not() -> None:
    squares = Squares(FakeCuda())
    squares.fails_with = DeviceMemoryError("too little")
    with pytest.raises(DeviceMemoryError, match="too little"):
        list(squares.run([batch(1)]))
    squares.fails_with = None
    assert list(squares.run([batch(1)])) == [(batch(1) ** 2).tolist()]
