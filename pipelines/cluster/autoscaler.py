"""Tells whether an autoscaler gives a Ray cluster its nodes: then it may get what it lacks now.

Knows nothing of what the cluster lacks.

Nodes that `ray up` or KubeRay started have types, but for those of `ray up` with version 1 of the
autoscaler; KubeRay's have them with autoscaling off, too.
Where nothing is to be scaled, Ray starts an autoscaler that only looks, and reports to the head as
others do. In its metrics it counts nodes by the types of a config of Ray's own, of which one is
that of no node. Ray has no public call that says it; where these metrics cannot be had, an
autoscaler that reports is taken for one that starts nodes.
"""

import functools
import http.client
import re
import time
import urllib.request
from collections.abc import Collection

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RpcError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.client import ray as client

from engine.errors import ClipmillError

# Ray gives it to nodes that were started as one of a cluster's types.
GROUP_LABEL = "ray.io/node-group"
# Until then an autoscaler of a new head may be on its way: it waits for the head, and begins then.
FIRST_REPORT_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_ANSWER_SECONDS = 30
_METRICS_SECONDS = 2.0
# Where the metrics of the autoscaler are, among what the head keeps.
_METRICS_KEY = "AutoscalerMetricsAddress"
# Of the config of one that only looks; `ray up` may name its head so, but then there is one.
_TYPE_OF_NO_NODE = "ray.head.default"
_COUNT = re.compile(r"^autoscaler_active_nodes\{([^}]*)\}", re.MULTILINE)


def can_grow() -> bool:
    """Whether an autoscaler gives the cluster its nodes; Ray must be initialized.

    The head is asked once: autoscalers neither come nor go while a process works. A cluster whose
    nodes have types, and whose head is new, is waited for until it is known. From afar (`ray://`)
    types are all that is seen.

    Raises:
        ClipmillError: The head does not answer.
    """
    if client.is_connected():
        return bool(_node_types())
    context = ray.get_runtime_context()
    try:
        return _is_scaled(context.gcs_address, context.get_session_name())
    except RpcError as error:
        raise ClipmillError(
            f"the head of the Ray cluster does not answer ({error}); see that it runs, then run "
            "the same command again"
        ) from error


def only_looks(metrics: str, *, session_name: str, types: Collection[str]) -> bool | None:
    """Whether these are metrics of an autoscaler that starts no nodes; None if they do not tell.

    Args:
        metrics: As they are scraped; of another cluster, if that has the port.
        session_name: Of this one.
        types: Of its nodes.
    """
    labels = [found for found in _COUNT.findall(metrics) if f'"{session_name}"' in found]
    if not labels:
        return None
    is_counted = any(f'NodeType="{_TYPE_OF_NO_NODE}"' in found for found in labels)
    return is_counted and _TYPE_OF_NO_NODE not in types


@functools.cache
def _is_scaled(gcs_address: str, session_name: str) -> bool:
    types = _node_types()
    while True:
        looks = only_looks(_metrics(), session_name=session_name, types=types)
        if looks is not None:
            return not looks
        if not types:
            return False
        if _head_seconds(gcs_address) > FIRST_REPORT_SECONDS:
            return _reports(gcs_address)
        time.sleep(_PAUSE_SECONDS)


def _node_types() -> set[str]:
    labels = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    return {found[GROUP_LABEL] for found in labels if GROUP_LABEL in found}


def _reports(gcs_address: str) -> bool:
    """Whether an autoscaler of version 1 or 2 tells the head of itself."""
    if _internal_kv_get(DEBUG_AUTOSCALING_STATUS):
        return True
    status = get_cluster_status(gcs_address, _ANSWER_SECONDS)
    return int(status.stats.autoscaler_version or 0) > 0


def _metrics() -> str:
    """Of the autoscaler; empty if they cannot be had."""
    address = (_internal_kv_get(_METRICS_KEY) or b"").decode()
    if not address:
        return ""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/metrics", timeout=_METRICS_SECONDS) as answer:
            text: str = answer.read().decode()
    # Another's port may answer by anything.
    except (OSError, http.client.HTTPException, UnicodeDecodeError):
        return ""
    return text


def _head_seconds(gcs_address: str) -> float:
    """For how long the head has been there."""
    nodes = GcsClient(gcs_address).get_all_node_info(timeout=_ANSWER_SECONDS).values()
    started_ms = max((node.start_time_ms for node in nodes if node.is_head_node), default=0)
    return time.time() - started_ms / 1000
