"""A meter that keeps what it is told, in the place of pipelines.progress.StageMeter."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from pipelines.metrics import Metric


class ListMeter:
    """Rows and bytes of each batch that ended, in order."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.added: Counter[tuple[str, ...]] = Counter()
        """Name of a metric and values of its labels -> what was added to it."""

    @contextmanager
    def batch(self) -> Iterator[Callable[[int, int], None]]:
        sizes = (0, 0)

        def size(num_rows: int, num_bytes: int) -> None:
            nonlocal sizes
            sizes = (num_rows, num_bytes)

        yield size
        self.batches.append(sizes)

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        if value:
            self.added[metric.name, *labels.values()] += value

    def count(self, num_rows: int, num_bytes: int, busy_seconds: float) -> None:
        assert busy_seconds >= 0
        self.batches.append((num_rows, num_bytes))
