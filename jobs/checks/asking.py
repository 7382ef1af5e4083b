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
from pipelines.cluster.cluster_nodes import node_line
from pipelines.cluster.placement import SLIVER
from pipelines.cluster.worker_logs import redact_worker

# For all nodes together: to start a worker that imports the project, and PyTorch where there are
# GPUs.
NODE_SECONDS = 120.0
_GPUS_IN_USE = "its GPUs are in use, and were not looked at"
# The node went while it was asked, as those of an autoscaler do.
_GONE = (NodeDiedError, TaskUnschedulableError, ActorUnschedulableError)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeAnswer:
    """What a node says of itself."""

    found: tuple[Check, ...] = ()
    """What it looked at."""
    fault: str | None = None
    """Why it could not look."""
    hung: str | None = None
    """What came to no end, though nothing kept it waiting."""
    unseen: str | None = None
    """What it did not look at, and why that is no fault."""


# Each with the node in words.
Nodes = Sequence[tuple[str, NodeAnswer]]
# Node -> what nobody has taken of it.
Free = Mapping[str, Mapping[str, float]]


def nodes_of(address: str) -> Nodes:
    """Ask every node of a cluster to look at itself; ClipmillError if none answers."""
    with ray_cluster(address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        free = _free_resources()
        looks = [_Look(node, free=free) for node in nodes]
        asked = [reference for look in looks for reference in look.asked.values()]
        ray.wait(asked, num_returns=len(asked), timeout=NODE_SECONDS)
        free = _free_resources()
        return [(node_line(look.node), look.answer(free)) for look in looks]


def _free_resources() -> Free:
    """Empty from afar, where nobody tells."""
    return {} if client.is_connected() else available_resources_per_node()


class _Look:
    """One node, and what it was asked: resource that must not all be taken -> reference."""

    def __init__(self, node: Mapping[str, Any], *, free: Free) -> None:
        """Ask; a look at GPUs needs a share of one, and none waits for who has them all."""
        self.node = node
        self._has_gpus = bool(node["Resources"].get("GPU"))
        checks = cpu_checks if self._has_gpus else node_checks
        self.asked = {"CPU": _asked(node["NodeID"], checks, num_gpus=0.0)}
        if self._has_gpus and self._is_free("GPU", free, unknown=True):
            self.asked["GPU"] = _asked(node["NodeID"], gpu_checks, num_gpus=SLIVER)

    def answer(self, free: Free) -> NodeAnswer:
        """As far as there is one, by what is free by now."""
        found: list[Check] = []
        try:
            for resource, reference in self.asked.items():
                if not ray.wait([reference], timeout=0)[0]:
                    return self._late(resource, found=found, free=free)
                found += ray.get(reference)
        except _GONE:
            return NodeAnswer(found=tuple(found), unseen="it left the cluster meanwhile")
        except RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return NodeAnswer(fault=f"{type(error).__name__}: {lines[-1].strip() if lines else ''}")
        is_unseen = self._has_gpus and "GPU" not in self.asked
        return NodeAnswer(found=tuple(found), unseen=_GPUS_IN_USE if is_unseen else None)

    def _late(self, resource: str, *, found: Sequence[Check], free: Free) -> NodeAnswer:
        """What waits for nobody hangs."""
        if self._is_free(resource, free, unknown=False):
            what = "its GPUs" if resource == "GPU" else "itself"
            hung = f"its look at {what} did not end within {NODE_SECONDS:g} s, and waits for nobody"
            return NodeAnswer(found=tuple(found), hung=hung)
        busy = f"it did not answer within {NODE_SECONDS:g} s: it may be busy"
        return NodeAnswer(found=tuple(found), unseen=_GPUS_IN_USE if resource == "GPU" else busy)

    def _is_free(self, resource: str, free: Free, *, unknown: bool) -> bool:
        """Whether nothing is done there that a look could wait for; `unknown` where nobody tells.

        A look at GPUs waits for a share of one, any other for whatever keeps the CPUs busy.
        """
        of_node = free.get(self.node["NodeID"])
        if of_node is None:
            return unknown
        total: float = self.node["Resources"].get(resource, 0.0)
        return of_node.get(resource, 0.0) >= min(total, SLIVER if resource == "GPU" else total)


def _asked(node_id: str, checks: Callable[[], list[Check]], *, num_gpus: float) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(_found)
    return task.options(scheduling_strategy=there).remote(checks)


def _found(checks: Callable[[], list[Check]]) -> list[Check]:
    """In a worker there."""
    redact_worker()
    return checks()
