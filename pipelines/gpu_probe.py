"""Looks at one of the cluster's GPUs, from a worker that has it.

Knows nothing of what is looked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from engine.errors import DeviceError

# Of a GPU: room for it is left beside most that use GPUs in part.
_PROBE_GPUS = 0.001
# For a GPU to become free.
PROBE_SECONDS = 300.0

# Calls a function in the worker; gives back what it returns, and raises what it raises.
Look = Callable[[Callable[[], Any]], Any]


@contextmanager
def gpu_probe() -> Iterator[Look]:
    """A worker of a GPU for the length of a block, started by the first look.

    One for all looks, since most of a look's time goes into its start. What it holds on the GPU
    ends with it.

    Looks raise DeviceError if no GPU has room.
    """
    workers: list[Any] = []

    def look(function: Callable[[], Any]) -> Any:
        if not workers:
            worker: Any = ray.remote(num_cpus=0, num_gpus=_PROBE_GPUS)(_Worker)
            workers.append(worker.options(max_restarts=3, max_task_retries=3).remote())
        try:
            return ray.get(workers[0].call.remote(function), timeout=PROBE_SECONDS)
        except GetTimeoutError as error:
            raise DeviceError(
                f"none of the cluster's {num_gpus():g} GPUs had room within {PROBE_SECONDS:g} s: "
                "wait for the jobs that use them, or use --backend onnxruntime to run on CPUs"
            ) from error

    try:
        yield look
    finally:
        for worker in workers:
            ray.kill(worker)


class _Worker:
    def call(self, function: Callable[[], Any]) -> Any:
        return function()


def num_gpus() -> float:
    """GPUs of the cluster."""
    return float(ray.cluster_resources().get("GPU", 0))
