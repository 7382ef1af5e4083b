"""Asks every node of a Ray cluster to look at itself, all at once.

Knows nothing of what is to be thought of the answers. That a node is busy is none of its faults.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import ActorUnschedulableError, NodeDiedError, RayError, TaskUnschedulableError
from ray.util.client import ray as client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.checks.check import Check
from jobs.checks.gpu import gpu_checks
from jobs.checks.node import cpu_checks, node_checks
from jobs.cluster import ray_cluster
from pipelines.cluster_nodes import node_line
from pipelines.worker_logs import redact_worker

# For all nodes together: to start a worker that imports the project, and PyTorch where there are
# GPUs.
NODE_SECONDS = 120.0
_PROBE_GPUS = 0.001
# The node went while it was asked, as those of an autoscaler do.
_GONE = (NodeDiedError, TaskUnschedulableError, ActorUnschedulableError)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeAnswer:
    """What a node says of itself."""

    found: tuple[Check, ...] = ()
    """What it looked at."""
    fault: str | None = None
    """Why it could not look."""
    unseen: str | None = None
    """What it did not look at, and why that is no fault."""


# Each with the node in words.
Nodes = Sequence[tuple[str, NodeAnswer]]


def nodes_of(address: str) -> Nodes:
    """Ask every node of a cluster to look at itself; ClipmillError if none answers."""
    with ray_cluster(address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        # From afar nobody tells what is free.
        free = {} if client.is_connected() else available_resources_per_node()
        looks = [_Look(node, free=free.get(node["NodeID"])) for node in nodes]
        asked = [reference for look in looks for reference in look.references]
        ray.wait(asked, num_returns=len(asked), timeout=NODE_SECONDS)
        return [(node_line(look.node), look.answer()) for look in looks]


class _Look:
    """One node, and what it was asked."""

    def __init__(self, node: Mapping[str, Any], *, free: Mapping[str, float] | None) -> None:
        """Ask; a look at GPUs needs a share of one, and none waits for who has them all."""
        self.node = node
        has_gpus = bool(node["Resources"].get("GPU"))
        self._is_in_use = has_gpus and free is not None and free.get("GPU", 0.0) < _PROBE_GPUS
        self._own = self._ask(cpu_checks if has_gpus else node_checks, num_gpus=0.0)
        self._of_gpus: Any = None
        if has_gpus and not self._is_in_use:
            self._of_gpus = self._ask(gpu_checks, num_gpus=_PROBE_GPUS)

    @property
    def references(self) -> list[Any]:
        """To be waited for."""
        return [self._own] if self._of_gpus is None else [self._own, self._of_gpus]

    def answer(self) -> NodeAnswer:
        """As far as there is one."""
        found: list[Check] = []
        try:
            for reference in self.references:
                if ray.wait([reference], timeout=0)[0]:
                    found += ray.get(reference)
                elif reference is self._own:
                    unseen = f"it started nothing within {NODE_SECONDS:g} s: it may be busy"
                    return NodeAnswer(unseen=unseen)
                else:
                    self._is_in_use = True
        except _GONE:
            return NodeAnswer(found=tuple(found), unseen="it left the cluster meanwhile")
        except RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return NodeAnswer(fault=f"{type(error).__name__}: {lines[-1].strip() if lines else ''}")
        unseen_gpus = "its GPUs are in use, and were not looked at" if self._is_in_use else None
        return NodeAnswer(found=tuple(found), unseen=unseen_gpus)

    def _ask(self, checks: Callable[[], list[Check]], *, num_gpus: float) -> Any:
        there = NodeAffinitySchedulingStrategy(self.node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(_found)
        return task.options(scheduling_strategy=there).remote(checks)


def _found(checks: Callable[[], list[Check]]) -> list[Check]:
    """In a worker there."""
    redact_worker()
    return checks()
