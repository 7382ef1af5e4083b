"""Looks at a Ray cluster, and waits for workers that have no place yet.

Knows nothing of what the workers do; `pipelines.placement` judges what is seen.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.autoscaler.v2.schema import ClusterStatus, NodeInfo
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import GetTimeoutError, RpcError
from ray.util.client import ray as client

from pipelines.placement import ClusterState, Node, Placement, PlacementWatch, Wanted

_log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
# Ray gives it to nodes that `ray up` or KubeRay started as one of their types.
GROUP_LABEL = "ray.io/node-group"
_MAX_FAILURES = 2


def can_grow() -> bool:
    """Whether the cluster's nodes have types, as those of an autoscaler do.

    Such a cluster may get what it lacks now, GPUs as well as CPUs.
    """
    return any(GROUP_LABEL in node["Labels"] for node in ray.nodes() if node["Alive"])


def cluster_state() -> ClusterState:
    """The cluster now; RpcError if it does not answer."""
    if client.is_connected():  # it reaches the head's client port alone
        return _state_of_nodes(ray.nodes())
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return state_of(status, can_grow=can_grow())


def state_of(status: ClusterStatus, *, can_grow: bool) -> ClusterState:
    """What Ray's head knows of nodes, of what waits, and of what its autoscaler does."""
    starting = [f"{launch.count} {launch.ray_node_type_name}" for launch in status.pending_launches]
    starting += [f"1 {node.ray_node_type_name}" for node in status.pending_nodes]
    failures = [
        f"{launch.ray_node_type_name}: {launch.details or 'no reason given'}"
        for launch in status.failed_launches
    ]
    demands = status.resource_demands.ray_task_actor_demand
    return ClusterState(
        nodes=tuple(map(_node, [*status.active_nodes, *status.idle_nodes])),
        pending=tuple(
            dict(bundles.bundle) for demand in demands for bundles in demand.bundles_by_count
        ),
        starting=tuple(starting),
        failures=tuple(dict.fromkeys(failures[-_MAX_FAILURES:])),
        can_grow=can_grow,
    )


def wait_for_place(references: Sequence[Any], *, wanted: Wanted, placement: Placement) -> None:
    """Wait until all references are there; say what their workers wait for if that lasts.

    Args:
        references: Of an actor that is ready, of tasks that have ended.
        wanted: What each of the workers takes.
        placement: For how long they may wait for it.

    Raises:
        PlacementError: They got no place in time.
    """
    left = list(references)
    looks = Looks([wanted], placement=placement, progress=lambda: -len(left))
    while left:
        _, left = ray.wait(left, num_returns=len(left), timeout=LOOK_SECONDS)
        if left:
            looks.look()


class Looks:
    """A watch, and the clock and the cluster that it looks at."""

    def __init__(
        self, wanted: Sequence[Wanted], *, placement: Placement, progress: Callable[[], float]
    ) -> None:
        """`progress` gives anything that changes while work is done."""
        self._watch = PlacementWatch(wanted, placement=placement)
        self._progress = progress
        self._next_seconds = time.monotonic() + LOOK_SECONDS

    def look(self) -> None:
        """At most every LOOK_SECONDS; the head may be away for a while."""
        now = time.monotonic()
        if now < self._next_seconds:
            return
        self._next_seconds = now + LOOK_SECONDS
        try:
            state, progress = cluster_state(), self._progress()
        except (RpcError, GetTimeoutError):
            return
        for line in self._watch.look(state, seconds=now, progress=progress):
            _log.warning("%s", line)


def _node(node: NodeInfo) -> Node:
    # A node that nobody gave a type is given one by Ray, of its id.
    has_group = node.ray_node_type_name != f"node_{node.node_id}"
    return Node(
        address=node.ip_address,
        group=node.ray_node_type_name if has_group else None,
        total=node.total_resources(),
        free=node.available_resources(),
    )


def _state_of_nodes(nodes: Sequence[dict[str, Any]]) -> ClusterState:
    alive = [node for node in nodes if node["Alive"]]
    return ClusterState(
        nodes=tuple(
            Node(
                address=node["NodeManagerAddress"],
                group=node["Labels"].get(GROUP_LABEL),
                total=node["Resources"],
                free=None,
            )
            for node in alive
        ),
        pending=None,
        can_grow=any(GROUP_LABEL in node["Labels"] for node in alive),
    )
