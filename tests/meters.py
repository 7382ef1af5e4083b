"""A meter that keeps what it is told, in the place of pipelines.progress.StageMeter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ListMeter:
    """Rows and bytes of each batch that ended, in order."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    @contextmanager
    def batch(self) -> Iterator[Callable[[int, int], None]]:
        sizes = (0, 0)

        def size(num_rows: int, num_bytes: int) -> None:
            nonlocal sizes
            sizes = (num_rows, num_bytes)

        yield size
        self.batches.append(sizes)

    def count(self, num_rows: int, num_bytes: int, busy_seconds: float) -> None:
        assert busy_seconds >= 0
        self.batches.append((num_rows, num_bytes))
