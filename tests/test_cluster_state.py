"""A look at a cluster, from what Ray's head reports of it; and looks while something is awaited."""

import dataclasses
import logging
from typing import Any

import pytest
import ray
from ray.autoscaler.v2.schema import ClusterStatus, Stats
from ray.autoscaler.v2.utils import ClusterStatusParser
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply, NodeStatus
from ray.exceptions import GetTimeoutError, RpcError

from pipelines.cluster import cluster_state
from pipelines.cluster.cluster_state import Looks, state_of
from pipelines.cluster.placement import ClusterState, Node, Placement, WorkerDemand
from pipelines.cluster.watched_runs import PlacementCallback, placement_watched
from pipelines.errors import PlacementError

WANTED = WorkerDemand(what="an encoder", resources={"GPU": 1.0}, kind="actor", option=None)
NO_GPU = ClusterState(
    nodes=(Node(address="10.0.0.1", group=None, total={"CPU": 2}, free=None),),
    pending=({"GPU": 1.0},),
    can_grow=False,
)


def reported_status() -> ClusterStatus:
    """As Ray reads it from its head: a node of a type, one without, three waiting, two to come."""
    reply = GetClusterStatusReply()
    state, autoscaling = reply.cluster_resource_state, reply.autoscaling_state
    for number, group, status in ((1, "head", NodeStatus.IDLE), (2, "", NodeStatus.RUNNING)):
        node = state.node_states.add(
            node_id=bytes([number]),
            node_ip_address=f"10.0.0.{number}",
            ray_node_type_name=group,
            status=status,
        )
        node.total_resources.update({"CPU": 4.0 * number, "GPU": 1.0})
        node.available_resources.update({"CPU": 1.0})
    state.node_states.add(node_id=b"3", node_ip_address="10.0.0.3", status=NodeStatus.DEAD)
    waiting = state.pending_resource_requests.add(count=3)
    waiting.request.resources_bundle.update({"CPU": 0.5, "GPU": 1.0})
    autoscaling.pending_instance_requests.add(ray_node_type_name="l4_worker", count=2)
    autoscaling.pending_instances.add(ray_node_type_name="cpu_worker", ip_address="10.0.0.7")
    for _ in range(3):
        autoscaling.failed_instance_requests.add(
            ray_node_type_name="h100_worker", count=1, reason="InsufficientInstanceCapacity"
        )
    return ClusterStatusParser.from_get_cluster_status_reply(reply, stats=Stats())


def test_what_the_head_reports_is_read():
    state = state_of(reported_status(), can_grow=True)
    nodes = sorted(state.nodes, key=lambda node: node.address)
    assert [(node.address, node.group) for node in nodes] == [
        ("10.0.0.1", "head"),
        ("10.0.0.2", None),
    ]
    assert nodes[1].total == {"CPU": 8.0, "GPU": 1.0}
    assert nodes[1].free == {"CPU": 1.0, "GPU": 0.0}
    assert state.pending == ({"CPU": 0.5, "GPU": 1.0},)
    assert state.starting == ("2 l4_worker", "1 cpu_worker")
    assert state.failures == ("h100_worker: InsufficientInstanceCapacity",)
    assert state.can_grow


def ray_node(*, is_alive: bool = True, **labels: str) -> dict[str, Any]:
    return {
        "Alive": is_alive,
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {"CPU": 2.0},
        "Labels": {"ray.io/node-id": "ab", **{f"ray.io/{k}": v for k, v in labels.items()}},
    }


def test_from_afar_only_the_nodes_are_seen(monkeypatch: pytest.MonkeyPatch):
    nodes = [ray_node(**{"node-group": "head"}), ray_node(is_alive=False)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster_state.client, "is_connected", lambda: True)
    assert cluster_state.cluster_state() == ClusterState(
        nodes=(Node(address="10.0.0.1", group="head", total={"CPU": 2.0}, free=None),),
        pending=None,
        can_grow=True,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Seconds that only a test moves; NO_GPU is what there is to be seen."""
    now = [0.0]
    monkeypatch.setattr(cluster_state.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cluster_state, "cluster_state", lambda: NO_GPU)
    return now


def test_a_watched_run_says_and_ends(clock: list[float], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)  # Ray may have left its handler with another
    callback = PlacementCallback()
    patience = Placement(warn_seconds=10, fail_seconds=20)
    with placement_watched([WANTED], placement=patience, progress=lambda: 0):
        callback.before_execution_starts(None)
        for clock[0] in range(6, 26):
            callback.on_execution_step(None)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "an encoder has waited 10 s for 1 GPU" in caplog.text
        clock[0] = 30
        with pytest.raises(PlacementError, match="Given up"):
            callback.on_execution_step(None)
    clock[0] = 100
    callback.on_execution_step(None)  # nobody watches any more


def test_a_run_is_watched_by_its_own_block(clock: list[float]):
    short, long = (Placement(warn_seconds=1, fail_seconds=seconds) for seconds in (10, 100))
    callback = PlacementCallback()
    with placement_watched([WANTED], placement=long, progress=lambda: 0):
        callback.before_execution_starts(None)
        with placement_watched([WANTED], placement=short, progress=lambda: 0):
            of_short = PlacementCallback()
            of_short.before_execution_starts(None)
            for clock[0] in (10, 20, 30):
                callback.on_execution_step(None)
            of_short.on_execution_step(None)
            clock[0] = 40
            with pytest.raises(PlacementError, match="has waited 10 s"):
                of_short.on_execution_step(None)
            callback.on_execution_step(None)


class Waits:
    """In the place of `ray.wait` and `ray.get`: what is there after each wait, by the clock."""

    def __init__(self, clock: list[float], *answers: list[Any]) -> None:
        self._clock, self._answers = clock, iter(answers)

    def wait(self, left: list[Any], *, num_returns: int, timeout: float) -> tuple[list, list]:
        done = next(self._answers, [])
        assert num_returns == 1
        self._clock[0] += 0 if done else timeout
        return done, [reference for reference in left if reference not in done]

    def get(self, done: list[Any]) -> None:
        for reference in done:
            if isinstance(reference, Exception):
                raise reference

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "wait", self.wait)
        monkeypatch.setattr(ray, "get", self.get)


def test_what_is_awaited_ends_the_wait(clock: list[float], monkeypatch: pytest.MonkeyPatch):
    Waits(clock, [], [], ["ready"]).put_in_place(monkeypatch)
    cluster_state.wait_for_place(["ready"], wanted=WANTED, placement=Placement())
    Waits(clock).put_in_place(monkeypatch)
    with pytest.raises(PlacementError, match="an encoder has waited 30 s for 1 GPU"):
        cluster_state.wait_for_place(
            ["ready"], wanted=WANTED, placement=Placement(warn_seconds=10, fail_seconds=30)
        )


def test_an_error_of_one_is_raised_while_others_are_awaited(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
):
    error = OSError("disk full")
    Waits(clock, ["a"], [error]).put_in_place(monkeypatch)
    with pytest.raises(OSError, match="disk full"):
        cluster_state.wait_for_place(["a", error, "b"], wanted=WANTED, placement=Placement())
    assert clock[0] == 0


@pytest.mark.parametrize("kind", ["actor", "task"])
def test_a_wait_of_which_nobody_knows_what_for_has_an_end(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, kind: Any
):
    with_gpu = Node(address="10.0.0.2", group=None, total={"GPU": 1}, free=None)
    unknown = ClusterState(nodes=(with_gpu,), pending=None, can_grow=False)
    monkeypatch.setattr(cluster_state, "cluster_state", lambda: unknown)
    Waits(clock).put_in_place(monkeypatch)
    with pytest.raises(PlacementError, match=r"has waited 30 s .* are in use"):
        cluster_state.wait_for_place(
            ["a"],
            wanted=dataclasses.replace(WANTED, kind=kind),
            placement=Placement(warn_seconds=10, fail_seconds=30),
        )


def test_a_count_that_is_late_hides_no_wait(clock: list[float]):
    counts = iter([5.0, None, None, 6.0, None, None, None])

    def progress() -> float:
        clock[0] += 2
        if (count := next(counts)) is None:
            raise GetTimeoutError
        return count

    looks = Looks(
        [WANTED], placement=Placement(warn_seconds=10, fail_seconds=30), progress=progress
    )
    for clock[0] in (10, 21, 22, 34, 46, 58, 70):  # 21 is too early after calls that took 2 s
        looks.look()
    clock[0] = 82
    with pytest.raises(PlacementError):
        looks.look()
    assert next(counts, "none left") == "none left"


def test_a_head_that_stays_away_is_told_of_once(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def away() -> ClusterState:
        clock[0] += 2
        raise RpcError("unavailable")

    monkeypatch.setattr(cluster_state, "cluster_state", away)
    caplog.set_level(logging.WARNING)
    looks = Looks([WANTED], placement=Placement(warn_seconds=30, fail_seconds=60), progress=int)
    for clock[0] in (10, 22):
        looks.look()
    assert caplog.messages == []
    for clock[0] in range(34, 200, 12):
        looks.look()
    (message,) = caplog.messages
    assert message.startswith("for 36 s the cluster's head has not said what waits for a place")
    assert "unavailable" in message


def test_a_head_that_is_away_is_looked_at_again(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
):
    looks = Looks([WANTED], placement=Placement(warn_seconds=1, fail_seconds=1), progress=int)

    def away() -> ClusterState:
        raise RpcError("unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(cluster_state, "cluster_state", away)
        for clock[0] in range(10, 60, 10):
            looks.look()
    looks.look()
    clock[0] = 60
    looks.look()
    clock[0] = 70
    with pytest.raises(PlacementError):
        looks.look()
