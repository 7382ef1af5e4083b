"""What Ray would say of a cluster, without Ray."""

from collections import Counter
from collections.abc import Mapping

import pytest
import ray

# Of nodes that an autoscaler starts, and of those that are there.
TYPED, UNTYPED = {"ray.io/node-group": "any"}, {"ray.io/node-id": "ab"}


def describe_cluster(
    patch: pytest.MonkeyPatch, *nodes: Mapping[str, float], labels: Mapping[str, str] = UNTYPED
) -> None:
    """Have Ray say that a cluster has these nodes, all with the same labels.

    Args:
        patch: Ends it.
        nodes: Resources of each.
        labels: With `TYPED`, an autoscaler gives the nodes.
    """
    found = [{"Alive": True, "Resources": dict(node), "Labels": labels} for node in nodes]
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node)
    patch.setattr(ray, "nodes", lambda: found)
    patch.setattr(ray, "cluster_resources", lambda: total)
    patch.setattr("pipelines.autoscaler._is_scaled", lambda *, types: bool(types))
