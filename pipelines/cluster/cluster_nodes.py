"""The nodes of the Ray cluster at hand, in words.

Knows nothing of what runs on them.
"""

from collections.abc import Mapping
from typing import Any

import ray

_ACCELERATOR = "accelerator_type:"  # how Ray spells a card's kind among a node's resources


def node_lines() -> tuple[str, ...]:
    """A line for each node that is alive, by name; Ray must be initialized."""
    return tuple(sorted(node_line(node) for node in ray.nodes() if node["Alive"]))


def node_line(node: Mapping[str, Any]) -> str:
    """One entry of `ray.nodes()`: `worker-7: 16 CPUs, 1 GPUs (H200)`."""
    resources = node["Resources"]
    cards = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    gpus = f", {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
    kind = f" ({', '.join(sorted(cards))})" if gpus and cards else ""
    return f"{node['NodeManagerHostname']}: {resources.get('CPU', 0):g} CPUs{gpus}{kind}"
