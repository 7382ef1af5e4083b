"""Maps a function over values in threads, as many results ahead of who takes them as is said.

Knows nothing of what is mapped. `Executor.map` runs ahead over all values.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


def bounded_map(
    function: Callable[[_Value], _Result], values: Iterable[_Value], *, num_threads: int
) -> Iterator[_Result]:
    """The result of each value, in their order.

    Args:
        function: Called in threads; what it raises is raised.
        values: Taken in the caller's thread.
        num_threads: Of so many values at most the results are being made, or wait to be taken.
    """
    begun: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        for value in values:
            begun.append(threads.submit(function, value))
            if len(begun) == num_threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
