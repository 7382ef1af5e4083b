"""Watches over Ray Data's runs, whose workers may get no place on the cluster.

Knows nothing of what is run; `pipelines.cluster.placement` judges what is seen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.cluster.cluster_state import Looks
from pipelines.cluster.placement import Placement, WorkerDemand

# Of the blocks that are under way. Ray Data makes callbacks of its own, without arguments.
_UNDER_WAY: list[Looks] = []


@contextmanager
def placement_watched(
    wanted: Sequence[WorkerDemand], *, placement: Placement, progress: Callable[[], float]
) -> Iterator[None]:
    """Watch over the runs of a block, which have `PlacementCallback` in their context.

    One whose workers get no place in time ends with PlacementError.

    Args:
        wanted: What its kinds of workers take.
        placement: How long they may wait for it.
        progress: Gives anything that changes while work is done.
    """
    looks = Looks(wanted, placement=placement, progress=progress)
    _UNDER_WAY.append(looks)
    try:
        yield
    finally:
        _UNDER_WAY.remove(looks)


class PlacementCallback(ExecutionCallback):
    """What Ray Data calls, one for each run; what it raises ends the run."""

    def __init__(self) -> None:
        """Begin without a watch."""
        self._looks: Looks | None = None

    def before_execution_starts(self, executor: Any) -> None:
        """Take the watch of the innermost block, whose run it is."""
        self._looks = _UNDER_WAY[-1] if _UNDER_WAY else None

    def on_execution_step(self, executor: Any) -> None:
        """Look, if it is time; called in the thread that schedules."""
        if self._looks in _UNDER_WAY:
            self._looks.look()
