"""Says what a worker that has no place waits for, and when that has lasted too long.

Knows nothing of Ray: what the cluster has and what waits is handed to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import PlacementError

# As Ray spells it among a node's resources; a worker that names a type takes this much of it.
ACCELERATOR_PREFIX = "accelerator_type:"
SLIVER = 0.001
# Beyond this many nodes alike, their number says more than their addresses.
_MAX_ADDRESSES = 3
# Of a resource: Ray counts in ten-thousandths.
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where encoders may go, and how long workers may wait for a place."""

    max_encoders: int | None = None
    """Encode actors at most, as the backlog asks; None: `Resources.num_encoders`."""
    accelerator_type: str | None = None
    """Of the encoders' GPUs, as Ray names it (L4, H100); None: any."""
    warn_seconds: float = 120.0
    """After that long without a place it is said what is waited for; a cloud's node takes less."""
    fail_seconds: float = 1800.0
    """After that long the run ends; long enough for a night's spot instances to come."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.max_encoders is not None and self.max_encoders < 1:
            raise ValueError(f"max_encoders={self.max_encoders}: expected at least 1")
        if self.accelerator_type is not None and not self.accelerator_type:
            raise ValueError("accelerator_type='': expected a name, such as L4")
        if self.warn_seconds <= 0:
            raise ValueError(f"warn_seconds={self.warn_seconds:g}: expected more than 0")
        if self.fail_seconds < self.warn_seconds:
            raise ValueError(
                f"fail_seconds={self.fail_seconds:g}: expected at least "
                f"warn_seconds={self.warn_seconds:g}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerDemand:
    """A kind of workers, and what each takes of a node."""

    what: str
    """For the message: `an encoder`."""
    resources: Mapping[str, float]
    """As Ray counts them."""
    kind: Literal["actor", "task", "queue"]
    """An actor should have its place whatever else goes on; a task may wait while others move; of a
    queue of tasks nobody tells how it moves, so that only a node that is missing counts."""
    option: str | None
    """That asks for so much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node that is alive."""

    address: str
    """Its IP address."""
    group: str | None
    """Its type, if whoever started it gave it one (`ray up`, KubeRay)."""
    total: Mapping[str, float]
    """What it has."""
    free: Mapping[str, float] | None
    """What of that nobody has taken; None if that is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterState:
    """A cluster at one moment."""

    nodes: tuple[Node, ...]
    """Those that are alive."""
    pending: tuple[Mapping[str, float], ...] | None
    """What workers wait for, of all jobs; None if that is not known."""
    starting: tuple[str, ...] = ()
    """Nodes that the autoscaler is starting, in words."""
    failures: tuple[str, ...] = ()
    """Why it could not start others."""
    can_grow: bool
    """Whether an autoscaler gives it nodes."""


def accelerator(placement: Placement) -> dict[str, float]:
    """What a worker takes so that it comes to a node with the GPUs asked for."""
    if placement.accelerator_type is None:
        return {}
    return {f"{ACCELERATOR_PREFIX}{placement.accelerator_type}": SLIVER}


class PlacementWatch:
    """Judges one look at a cluster after the other."""

    def __init__(self, wanted: Sequence[WorkerDemand], *, placement: Placement) -> None:
        """Begin with nothing waiting."""
        self._wanted = wanted
        self._placement = placement
        self._since: dict[str, float] = {}
        self._said: set[str] = set()
        self._progress: float | None = None
        self._moved_seconds = 0.0

    def look(self, state: ClusterState, *, seconds: float, progress: float) -> list[str]:
        """What is to be said now: of each kind once, as long as it waits.

        Args:
            state: Of the cluster.
            seconds: Of any clock that does not go back.
            progress: Anything that changes while work is done.

        Raises:
            PlacementError: One has waited for `fail_seconds`, and nothing was done meanwhile.
        """
        if progress != self._progress:
            self._progress, self._moved_seconds = progress, seconds
        lines = []
        for wanted in self._wanted:
            if not _is_waiting(wanted, state):
                self._since.pop(wanted.what, None)
                self._said.discard(wanted.what)
                continue
            since = self._since.setdefault(wanted.what, seconds)
            idle = seconds - max(since, self._moved_seconds)
            if idle >= self._placement.fail_seconds:
                text = waiting_text(wanted, seconds=seconds - since, state=state)
                raise PlacementError(f"{text}. Given up; --placement-timeout allows more")
            waited = seconds - since if wanted.kind == "actor" else idle
            if waited >= self._placement.warn_seconds and wanted.what not in self._said:
                self._said.add(wanted.what)
                lines.append(waiting_text(wanted, seconds=waited, state=state))
        return lines


def waiting_text(wanted: WorkerDemand, *, seconds: float, state: ClusterState) -> str:
    """What is waited for, for how long, what there is and where, and what would help."""
    able = [node for node in state.nodes if _has_room(node.total, wanted.resources)]
    head = f"{wanted.what} has waited {seconds:.0f} s for {_amounts(wanted.resources)}"
    if able:
        there = f"the nodes that have as much are in use: {_nodes_text(able, wanted, free=True)}"
    elif state.nodes:
        there = f"no node has as much: {_nodes_text(state.nodes, wanted, free=False)}"
    else:
        there = "the cluster has no node"
    return f"{head}; {there}; {_autoscaler_text(state)}; {_way_out(wanted, is_there=bool(able))}"


def _is_waiting(wanted: WorkerDemand, state: ClusterState) -> bool:
    is_missing = not any(_has_room(node.total, wanted.resources) for node in state.nodes)
    if wanted.kind == "queue" or state.pending is None:
        return is_missing
    return any(_is_same(pending, wanted.resources) for pending in state.pending)


def _has_room(room: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(room.get(name, 0) >= amount - _TOLERANCE / 2 for name, amount in wanted.items())


def _is_same(pending: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    names = wanted.keys() | {"CPU", "GPU"}
    return all(abs(pending.get(name, 0) - wanted.get(name, 0)) < _TOLERANCE for name in names)


def _amounts(resources: Mapping[str, float]) -> str:
    parts = []
    for name, amount in resources.items():
        if name.startswith(ACCELERATOR_PREFIX):
            parts.append(f"accelerator type {name.removeprefix(ACCELERATOR_PREFIX)}")
        elif amount:
            parts.append(f"a {name}" if amount <= SLIVER else f"{amount:g} {name}")
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _nodes_text(nodes: Sequence[Node], wanted: WorkerDemand, *, free: bool) -> str:
    alike: dict[str, list[str]] = {}
    for node in nodes:
        has = " ".join([_counted(node.total, wanted), *_accelerators(node)])
        if free and node.free is not None:
            has += f", free {_counted(node.free, wanted)}"
        kind = f" {node.group}" if node.group else ""
        alike.setdefault(f"{kind}: {has}", []).append(node.address)
    return "; ".join(f"{_addresses(found)}{text}" for text, found in alike.items())


def _counted(amounts: Mapping[str, float], wanted: WorkerDemand) -> str:
    shown = [name for name in wanted.resources if not name.startswith(ACCELERATOR_PREFIX)]
    names = dict.fromkeys(["CPU", "GPU", *shown])
    return ", ".join(f"{amounts.get(name, 0):g} {name}" for name in names)


def _accelerators(node: Node) -> list[str]:
    return [
        f"({name.removeprefix(ACCELERATOR_PREFIX)})"
        for name in node.total
        if name.startswith(ACCELERATOR_PREFIX)
    ]


def _addresses(addresses: Sequence[str]) -> str:
    left = len(addresses) - _MAX_ADDRESSES
    shown = ", ".join(addresses[:_MAX_ADDRESSES])
    return f"{shown} and {left} more" if left > 0 else shown


def _autoscaler_text(state: ClusterState) -> str:
    failed = f"; it failed to start others: {'; '.join(state.failures)}" if state.failures else ""
    if state.starting:
        return f"the autoscaler is starting {', '.join(state.starting)}{failed}"
    if state.can_grow:
        return f"the autoscaler is starting none{failed} (`ray status` on the head says more)"
    if any(node.group for node in state.nodes):
        return "no autoscaler reports to the head (a RayCluster's has enableInTreeAutoscaling)"
    return "there is no autoscaler"


def _way_out(wanted: WorkerDemand, *, is_there: bool) -> str:
    ways = ["wait for the jobs that use them" if is_there else "add a node that has as much"]
    if any(name.startswith(ACCELERATOR_PREFIX) for name in wanted.resources):
        ways.append("name another --accelerator-type, or none")
    if wanted.option:
        ways.append(f"ask for less with {wanted.option}")
    if wanted.resources.get("GPU", 0):
        ways.append("use --backend onnxruntime to run on CPUs")
    return ", or ".join(ways)
