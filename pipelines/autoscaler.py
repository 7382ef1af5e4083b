"""Tells whether an autoscaler gives a Ray cluster its nodes: then it may get what it lacks now.

Knows nothing of what the cluster lacks.

Nodes that `ray up` or KubeRay started have types; KubeRay's have them with autoscaling off, too. So
the head is asked whether an autoscaler has reported to it. That of version 2 reports its state. In
its place, where nothing is to be scaled, Ray starts one that only looks: it takes each node for a
type of its own, and on KubeRay's nodes it fails before it reports (Ray 2.60; if a later one did
report there, such a cluster would be taken for one that grows). That of version 1 writes down the
types of its nodes, and so does the one that only looks. Ray has no public call that says it.
"""

import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.client import ray as client

# Ray gives it to nodes that were started as one of a cluster's types.
GROUP_LABEL = "ray.io/node-group"
# Until then an autoscaler of a new head may be on its way: it waits for the head, and begins then.
FIRST_REPORT_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_ANSWER_SECONDS = 30
_TYPE_OF_ONE_NODE = re.compile(r"node_[0-9a-f]+")


def can_grow() -> bool:
    """Whether an autoscaler gives the cluster its nodes; Ray must be initialized.

    A cluster whose nodes have types, and whose head is new, is waited for until it is known. From
    afar (`ray://`) types are all that is seen.

    Raises:
        RpcError: The head does not answer.
    """
    has_types = have_types([node for node in ray.nodes() if node["Alive"]])
    return has_types if client.is_connected() else _is_scaled(has_types=has_types)


def have_types(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any of `ray.nodes()` was started as one of a cluster's types."""
    return any(GROUP_LABEL in node["Labels"] for node in nodes)


def has_reported(status: ClusterStatus | None, *, v1_status: bytes | None) -> bool:
    """Whether an autoscaler that starts nodes has told the head of itself.

    Args:
        status: What the head knows; None: that is not looked at.
        v1_status: What an autoscaler of version 1 wrote down; None: nothing.
    """
    if status is not None and int(status.stats.autoscaler_version or 0) > 0:
        return True
    report = json.loads(v1_status or b"{}").get("autoscaler_report") or {}
    types = {*report.get("active_nodes", ()), *report.get("pending_launches", ())}
    return any(not _TYPE_OF_ONE_NODE.fullmatch(name) for name in types)


def _is_scaled(*, has_types: bool) -> bool:
    context = ray.get_runtime_context()
    return _found(context.gcs_address, context.get_job_id(), has_types)


# It is asked for all the time that a job waits; autoscalers neither come nor go meanwhile.
@functools.lru_cache(maxsize=8)
def _found(gcs_address: str, job_id: str, has_types: bool) -> bool:
    while True:
        # Without types there is none of version 2.
        status = get_cluster_status(gcs_address, _ANSWER_SECONDS) if has_types else None
        if has_reported(status, v1_status=_internal_kv_get(DEBUG_AUTOSCALING_STATUS)):
            return True
        if not has_types or _head_seconds(gcs_address) > FIRST_REPORT_SECONDS:
            return False
        time.sleep(_PAUSE_SECONDS)


def _head_seconds(gcs_address: str) -> float:
    """For how long the head has been there."""
    nodes = GcsClient(gcs_address).get_all_node_info(timeout=_ANSWER_SECONDS).values()
    started_ms = max((node.start_time_ms for node in nodes if node.is_head_node), default=0)
    return time.time() - started_ms / 1000
