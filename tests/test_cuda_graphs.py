"""Batches through a small tower on a card, and what can be checked without one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.backends.cuda_graphs import NUM_SLOTS, CudaGraphRunner, row_sizes
from engine.errors import DeviceMemoryError
from engine.towers import TextTower

MAX_ROWS, LENGTH, WIDTH, NUM_IDS = 6, 16, 12, 50


class MeanOfTokens(nn.Module):
    """The mean of a row's token vectors; none for id 0, so that a row of zeros gives NaN."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(NUM_IDS, WIDTH, generator=generator))

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = self.table[token_ids] * (token_ids > 0)[..., None]
        return rows.mean(dim=1)


@pytest.fixture
def runner() -> CudaGraphRunner:
    device = torch.device("cuda", 0)
    tower = TextTower(backbone=MeanOfTokens(), projection=nn.Identity()).eval().to(device)
    return CudaGraphRunner(
        tower,
        row_shape=(LENGTH,),
        dtype=torch.int32,
        max_rows=MAX_ROWS,
        length_step=4,
        device=device,
    )


def batches(num_batches: int) -> list[NDArray[np.int32]]:
    """Of different numbers of rows and lengths."""
    random = np.random.default_rng(0)
    shapes = [(1 + number % MAX_ROWS, 4 + 4 * (number % 4)) for number in range(num_batches)]
    return [random.integers(1, NUM_IDS, shape, dtype=np.int32) for shape in shapes]


def expected(batch: NDArray[np.int32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        mean = MeanOfTokens()(torch.from_numpy(batch))
        return nn.functional.normalize(mean).numpy()


def test_row_sizes() -> None:
    assert row_sizes(256) == [1, 4, 16, 64, 256]
    assert row_sizes(100) == [1, 2, 7, 25, 100]
    assert row_sizes(1) == [1]


@pytest.mark.gpu
def test_batches_of_all_shapes_in_order(runner: CudaGraphRunner) -> None:
    given = batches(30)
    found = list(runner.run(given))
    assert len(found) == len(given)
    for batch, embeddings in zip(given, found, strict=True):
        np.testing.assert_allclose(embeddings, expected(batch), atol=1e-6)


@pytest.mark.gpu
def test_overlapped_batches_equal_single_ones_bit_by_bit(runner: CudaGraphRunner) -> None:
    given = batches(100)
    together = list(runner.run(given))
    for batch, embeddings in zip(given, together, strict=True):
        np.testing.assert_array_equal(next(iter(runner.run([batch]))), embeddings)


@pytest.mark.gpu
def test_batches_are_taken_only_as_slots_are_free(runner: CudaGraphRunner) -> None:
    num_taken = 0

    def counted() -> Iterator[NDArray[np.int32]]:
        nonlocal num_taken
        for batch in batches(10):
            num_taken += 1
            yield batch

    results = runner.run(counted())
    next(results)
    assert num_taken == NUM_SLOTS + 1
    assert len(list(results)) == 9


@pytest.mark.gpu
def test_a_run_that_is_left_early_disturbs_no_other(runner: CudaGraphRunner) -> None:
    given = batches(10)
    for _ in range(NUM_SLOTS + 1):
        results = runner.run(given)
        next(results)
        results.close()
    np.testing.assert_allclose(list(runner.run(given))[9], expected(given[9]), atol=1e-6)


@pytest.mark.gpu
def test_runs_of_several_threads_equal_single_ones_bit_by_bit(runner: CudaGraphRunner) -> None:
    # More threads than slots, each with batches on the card and in host memory.
    given = batches(40)
    alone = [next(iter(runner.run([batch]))) for batch in given]

    def run(_: int) -> list[NDArray[np.float32]]:
        mixed = [
            torch.from_numpy(batch).to("cuda") if number % 2 else batch
            for number, batch in enumerate(given)
        ]
        torch.cuda.synchronize()
        return list(runner.run(mixed))

    with ThreadPoolExecutor(NUM_SLOTS + 2) as threads:
        for found in threads.map(run, range(3 * NUM_SLOTS)):
            for embeddings, expected_ in zip(found, alone, strict=True):
                np.testing.assert_array_equal(embeddings, expected_)


@pytest.mark.gpu
def test_a_batch_that_is_too_large_keeps_no_slot(runner: CudaGraphRunner) -> None:
    too_large = np.ones((MAX_ROWS + 1, LENGTH), dtype=np.int32)
    for _ in range(NUM_SLOTS):
        with pytest.raises(RuntimeError):
            list(runner.run([*batches(2), too_large]))
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(lambda: list(runner.run(batches(NUM_SLOTS + 1)))).result(60)
    assert len(found) == NUM_SLOTS + 1


@pytest.mark.gpu
def test_a_run_waits_for_the_slots_of_another(runner: CudaGraphRunner) -> None:
    others = runner.run(batches(2 * NUM_SLOTS))
    next(others)  # which holds all slots
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: list(runner.run(batches(1))))
        with pytest.raises(TimeoutError):
            waiting.result(0.5)
        assert len(list(others)) == 2 * NUM_SLOTS - 1
        np.testing.assert_allclose(waiting.result(60)[0], expected(batches(1)[0]), atol=1e-6)


@pytest.mark.gpu
def test_a_batch_that_may_not_be_written(runner: CudaGraphRunner) -> None:
    batch = batches(3)[2]
    embeddings = expected(batch)
    batch.flags.writeable = False
    np.testing.assert_allclose(next(iter(runner.run([batch]))), embeddings, atol=1e-6)


@pytest.mark.gpu
def test_nan_stays_in_its_batch(runner: CudaGraphRunner) -> None:
    sound = batches(3)[2]
    found = list(runner.run([sound, np.zeros((2, 8), dtype=np.int32), sound]))
    assert np.isnan(found[1]).all()
    for number in (0, 2):
        np.testing.assert_allclose(found[number], expected(sound), atol=1e-6)


@pytest.mark.gpu
def test_too_large_a_batch_shows_at_once() -> None:
    device = torch.device("cuda", 0)
    tower = TextTower(backbone=MeanOfTokens(), projection=nn.Identity()).eval().to(device)
    with pytest.raises(DeviceMemoryError, match="use smaller batches"):
        CudaGraphRunner(
            tower,
            row_shape=(LENGTH,),
            dtype=torch.int32,
            max_rows=2**33,
            length_step=4,
            device=device,
        )
