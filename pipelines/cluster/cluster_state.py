"""Looks at a Ray cluster, and waits for workers that have no place yet.

Knows nothing of what the workers do; `pipelines.cluster.placement` judges what is seen.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.autoscaler.v2.schema import ClusterStatus, NodeInfo
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import GetTimeoutError, RpcError
from ray.util.client import ray as client

from engine.errors import ClipmillError
from pipelines.cluster.autoscaler import GROUP_LABEL, can_grow
from pipelines.cluster.placement import ClusterState, Node, Placement, PlacementWatch, WorkerDemand

_log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
# For the head's answer, a whole number for Ray; Ray Data schedules nothing meanwhile.
_ANSWER_SECONDS = 2
_MAX_FAILURES = 2


def cluster_state() -> ClusterState:
    """The cluster now; RpcError or ClipmillError if it does not answer."""
    if client.is_connected():  # it reaches the head's client port alone
        return _state_of_nodes(ray.nodes())
    status = get_cluster_status(ray.get_runtime_context().gcs_address, _ANSWER_SECONDS)
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


def wait_for_place(
    references: Sequence[Any], *, wanted: WorkerDemand, placement: Placement
) -> None:
    """Wait until all references are there; say what their workers wait for if that lasts.

    What one of them raises is raised at once.

    Args:
        references: Of calls of an actor, of tasks.
        wanted: What each of the workers takes.
        placement: For how long they may wait for it.

    Raises:
        PlacementError: They got no place in time.
    """
    left = list(references)
    looks = Looks(
        [wanted],
        placement=placement,
        progress=lambda: -len(left),
        # Where nobody knows what waits: or the wait might have no end.
        assumed=(wanted.resources,),
    )
    while left:
        done, left = ray.wait(left, num_returns=1, timeout=LOOK_SECONDS)
        ray.get(done)
        if left:
            looks.look()


class Looks:
    """A watch, and the clock and the cluster that it looks at."""

    def __init__(
        self,
        wanted: Sequence[WorkerDemand],
        *,
        placement: Placement,
        progress: Callable[[], float],
        assumed: tuple[Mapping[str, float], ...] | None = None,
    ) -> None:
        """Begin with a clock that has just started.

        Args:
            wanted: What the kinds of workers take.
            placement: For how long they may wait for it.
            progress: Gives anything that changes while work is done; GetTimeoutError if that is
                not known in time, then it counts as unchanged.
            assumed: What waits where the cluster does not tell; None: nothing is known then.
        """
        self._watch = PlacementWatch(wanted, placement=placement)
        self._warn_seconds = placement.warn_seconds
        self._progress, self._last_progress = progress, 0.0
        self._assumed = assumed
        self._seen_seconds = time.monotonic()
        self._next_seconds = self._seen_seconds + LOOK_SECONDS
        self._said_unseen = False

    def look(self) -> None:
        """At most every LOOK_SECONDS; the head may be away for a while."""
        if time.monotonic() < self._next_seconds:
            return
        try:
            state = cluster_state()
        except (RpcError, GetTimeoutError, ClipmillError) as error:
            self._unseen(error)
            return
        if state.pending is None:
            state = replace(state, pending=self._assumed)
        with suppress(GetTimeoutError):
            self._last_progress = self._progress()
        now = time.monotonic()
        self._seen_seconds, self._next_seconds = now, now + LOOK_SECONDS
        self._said_unseen = False
        for line in self._watch.look(state, seconds=now, progress=self._last_progress):
            _log.warning("%s", line)

    def _unseen(self, error: Exception) -> None:
        now = time.monotonic()
        self._next_seconds = now + LOOK_SECONDS
        seconds = now - self._seen_seconds
        if seconds >= self._warn_seconds and not self._said_unseen:
            self._said_unseen = True
            _log.warning(
                "for %.0f s the cluster's head has not said what waits for a place: %s; while it "
                "does not, no wait is told of or ended (`ray status` on the head says more)",
                seconds,
                error,
            )


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
    alive = tuple(
        Node(
            address=node["NodeManagerAddress"],
            group=node["Labels"].get(GROUP_LABEL),
            total=node["Resources"],
            free=None,
        )
        for node in nodes
        if node["Alive"]
    )
    return ClusterState(nodes=alive, pending=None, can_grow=any(node.group for node in alive))
