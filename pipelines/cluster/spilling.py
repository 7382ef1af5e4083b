"""Asks Ray how much its object stores wrote to disk for want of memory.

Knows nothing of what was in them.
"""

import logging

import grpc
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.util.client import ray as client

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0


def spilled_bytes() -> int | None:
    """By all jobs on the nodes of the cluster, since each began; Ray must be initialized.

    None if it is not known: from afar (`ray://`), or where a node does not answer in time.
    """
    if client.is_connected():  # it reaches the head's client port alone
        return None
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    try:
        reply = get_memory_info_reply(state, timeout_seconds=_ANSWER_SECONDS)
    except grpc.RpcError as error:
        _log.debug("spilled bytes are not known: %s", error)
        return None
    return int(reply.store_stats.spilled_bytes_total)
