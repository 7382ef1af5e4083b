"""Counts what Ray's object stores write to disk for want of memory.

Knows nothing of what was in them.
"""

import logging

import grpc
import ray
from ray._private.internal_api import get_memory_info_reply

_log = logging.getLogger(__name__)

# Nodes ask all of their workers, one of which may hang; the report of a run can do without.
_ANSWER_SECONDS = 10.0


class SpillCount:
    """What the nodes of the cluster spilled since this was made, by all jobs.

    The node that this process is on asks the others, so that the head need not answer. Who is lost
    meanwhile is no longer counted.
    """

    def __init__(self) -> None:
        """Take what was spilled before; Ray must be initialized."""
        here = ray.get_runtime_context().get_node_id()
        (self._node,) = (node for node in ray.nodes() if node["NodeID"] == here)
        self._before = self._total()

    def num_bytes(self) -> int | None:
        """Bytes written so far; None if nodes do not answer, or one that had spilled is lost."""
        now = self._total()
        if now is None or self._before is None or now < self._before:
            return None
        return now - self._before

    def _total(self) -> int | None:
        try:
            reply = get_memory_info_reply(
                None,
                node_manager_address=self._node["NodeManagerAddress"],
                node_manager_port=self._node["NodeManagerPort"],
                timeout_seconds=_ANSWER_SECONDS,
            )
        except grpc.RpcError as error:
            _log.debug("what was spilled is not known: %s", error)
            return None
        return int(reply.store_stats.spilled_bytes_total)
