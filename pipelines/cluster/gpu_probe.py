"""Looks at one of the cluster's GPUs, from a worker that has it.

Knows nothing of what is looked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipelines.cluster.cluster_state import wait_for_place
from pipelines.cluster.placement import SLIVER, Placement, WorkerDemand, accelerator
from pipelines.cluster.worker_logs import redact_worker

# Of a GPU: room for it is left beside most that use GPUs in part.
_PROBE_GPUS = SLIVER

# Calls a function in the worker; gives back what it returns, and raises what it raises.
Look = Callable[[Callable[[], Any]], Any]


@contextmanager
def gpu_probe(placement: Placement) -> Iterator[Look]:
    """A worker of a GPU for the length of a block, started by the first look.

    One for all looks, since most of a look's time goes into its start. What it holds on the GPU
    ends with it.

    Looks raise PlacementError if no GPU of the type asked for has room in time.
    """
    workers: list[Any] = []
    wanted = WorkerDemand(
        what="a look at a GPU",
        resources={"GPU": _PROBE_GPUS, **accelerator(placement)},
        kind="actor",
        option=None,
    )

    def look(function: Callable[[], Any]) -> Any:
        if not workers:
            worker: Any = ray.remote(num_cpus=0, num_gpus=_PROBE_GPUS)(_Worker)
            worker = worker.options(
                accelerator_type=placement.accelerator_type, max_restarts=3, max_task_retries=3
            )
            workers.append(worker.remote())
        looked = workers[0].call.remote(function)
        # Again for each look: a worker whose node is gone needs another place.
        wait_for_place([looked], wanted=wanted, placement=placement)
        return ray.get(looked)

    try:
        yield look
    finally:
        for worker in workers:
            ray.kill(worker)


class _Worker:
    def call(self, function: Callable[[], Any]) -> Any:
        redact_worker()
        return function()


def num_gpus() -> float:
    """GPUs of the cluster."""
    return float(ray.cluster_resources().get("GPU", 0))
