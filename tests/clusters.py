"""What Ray would say of a cluster, without Ray."""

from collections import Counter
from collections.abc import Mapping

import pytest
import ray

# That ask whether it grows.
ASKING = ("cluster.resources", "engines", "preparing", "stages")


def describe_cluster(
    patch: pytest.MonkeyPatch, *nodes: Mapping[str, float], grows: bool = False
) -> None:
    """Have Ray say that a cluster has these nodes.

    Args:
        patch: Ends it.
        nodes: Resources of each.
        grows: Whether an autoscaler gives it its nodes.
    """
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node)
    found = [{"Alive": True, "Resources": dict(node), "Labels": {}} for node in nodes]
    patch.setattr(ray, "nodes", lambda: found)
    patch.setattr(ray, "cluster_resources", lambda: total)
    for module in ASKING:
        patch.setattr(f"pipelines.{module}.can_grow", lambda: grows)
