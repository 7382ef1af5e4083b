"""What is said of workers without a place, and when it ends a run; no Ray is needed for it."""

import dataclasses
import re
from typing import Any

import pytest

from pipelines.cluster.placement import (
    ClusterState,
    Node,
    Placement,
    PlacementWatch,
    WorkerDemand,
    accelerator,
    waiting_text,
)
from pipelines.errors import PlacementError

ENCODER = WorkerDemand(
    what="an encoder",
    resources={"CPU": 0.5, "GPU": 1.0, "accelerator_type:H100": 0.001},
    kind="actor",
    option="--encoder-gpus",
)
DECODING = WorkerDemand(
    what="decoding", resources={"CPU": 0.5}, kind="task", option="--decode-cpus"
)
HEAD = Node(address="10.0.0.1", group="head", total={"CPU": 0.0}, free={"CPU": 0.0})
UNTYPED = dataclasses.replace(HEAD, group=None)
H100 = Node(
    address="10.0.0.9",
    group="h100_worker",
    total={"CPU": 16.0, "GPU": 1.0, "accelerator_type:H100": 1.0, "memory": 2e11},
    free={"CPU": 3.0, "accelerator_type:H100": 0.999},
)


def l4(last: int) -> Node:
    total = {"CPU": 16.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
    return Node(address=f"10.0.1.{last}", group="l4_worker", total=total, free=total)


def state(*nodes: Node, pending: Any = (ENCODER.resources,), **changes: Any) -> ClusterState:
    return dataclasses.replace(ClusterState(nodes=nodes, pending=pending, can_grow=True), **changes)


def test_it_says_what_is_wanted_what_there_is_where_and_what_the_autoscaler_does():
    there = state(HEAD, *map(l4, range(1, 6)), starting=("1 h100_worker",))
    assert waiting_text(ENCODER, seconds=120.4, state=there) == (
        "an encoder has waited 120 s for 0.5 CPU, 1 GPU and accelerator type H100; no node has as "
        "much: 10.0.0.1 head: 0 CPU, 0 GPU; 10.0.1.1, 10.0.1.2, 10.0.1.3 and 2 more l4_worker: 16 "
        "CPU, 1 GPU (L4); the autoscaler is starting 1 h100_worker; add a node that has as much, "
        "or name another --accelerator-type, or none, or ask for less with --encoder-gpus, or use "
        "--backend onnxruntime to run on CPUs"
    )


def test_it_says_which_nodes_would_do_and_are_in_use():
    assert waiting_text(ENCODER, seconds=7, state=state(HEAD, l4(1), H100)).startswith(
        "an encoder has waited 7 s for 0.5 CPU, 1 GPU and accelerator type H100; the nodes that "
        "have as much are in use: 10.0.0.9 h100_worker: 16 CPU, 1 GPU (H100), free 3 CPU, 0 GPU; "
        "the autoscaler is starting none (`ray status` on the head says more); wait for the jobs "
        "that use them, or "
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": ()}, "; the cluster has no node; "),
        ({"can_grow": False}, "; no autoscaler reports to the head (a RayCluster's has "),
        ({"can_grow": False, "nodes": (UNTYPED,)}, "; there is no autoscaler; "),
        (
            {"failures": ("h100_worker: InsufficientInstanceCapacity",)},
            "the autoscaler is starting none; it failed to start others: h100_worker: "
            "InsufficientInstanceCapacity (",
        ),
    ],
)
def test_it_says_why_none_comes(changes: dict, said: str):
    assert said in waiting_text(ENCODER, seconds=1, state=state(HEAD, **changes))


def test_a_task_on_cpus_is_told_nothing_of_gpus():
    text = waiting_text(DECODING, seconds=1, state=state(UNTYPED, can_grow=False))
    assert text.endswith(
        "0.5 CPU; no node has as much: 10.0.0.1: 0 CPU, 0 GPU; there is no autoscaler; add a "
        "node that has as much, or ask for less with --decode-cpus"
    )


def look(watch: PlacementWatch, there: ClusterState, seconds: float, progress: float = 0):
    return watch.look(there, seconds=seconds, progress=progress)


def test_an_actor_that_waits_is_told_of_once_and_again_when_it_waits_anew():
    watch = PlacementWatch([ENCODER], placement=Placement())
    waiting, placed = state(HEAD), state(HEAD, H100, pending=())
    assert look(watch, waiting, 1000) == []
    assert look(watch, waiting, 1119) == []
    (line,) = look(watch, waiting, 1120, progress=5)  # whatever else goes on
    assert line.startswith("an encoder has waited 120 s for")
    assert look(watch, waiting, 1130) == []
    assert look(watch, placed, 1140) == []
    assert look(watch, waiting, 1150) == []
    assert len(look(watch, waiting, 1270)) == 1


def test_the_run_ends_only_if_nothing_was_done_meanwhile():
    watch = PlacementWatch([ENCODER], placement=Placement(warn_seconds=10, fail_seconds=50))
    for seconds in range(0, 500, 10):
        look(watch, state(HEAD), seconds, progress=seconds)
    look(watch, state(HEAD), 539, progress=490)
    with pytest.raises(PlacementError, match=r"an encoder has waited 540 s .*--placement-timeout"):
        look(watch, state(HEAD), 540, progress=490)


def test_tasks_may_wait_while_others_move():
    watch = PlacementWatch([DECODING], placement=Placement(warn_seconds=10, fail_seconds=50))
    busy = state(H100, pending=(DECODING.resources,))
    for seconds in range(0, 500, 5):
        assert look(watch, busy, seconds, progress=seconds) == []
    assert look(watch, busy, 500, progress=495) == []
    (line,) = look(watch, busy, 505, progress=495)
    assert line.startswith("decoding has waited 10 s for 0.5 CPU; the nodes that have")


def test_of_a_queue_only_a_missing_node_counts():
    queue = dataclasses.replace(DECODING, kind="queue")
    watch = PlacementWatch([queue], placement=Placement(warn_seconds=10, fail_seconds=50))
    for seconds in range(0, 500, 5):
        assert look(watch, state(H100, pending=(queue.resources,)), seconds) == []
    look(watch, state(HEAD), 500)
    with pytest.raises(PlacementError, match="decoding has waited 50 s"):
        look(watch, state(HEAD), 550)


def test_where_nobody_knows_what_waits_a_missing_node_counts():
    watch = PlacementWatch([ENCODER], placement=Placement(warn_seconds=10))
    unknown = state(H100, pending=None)
    assert [look(watch, unknown, seconds) for seconds in (0, 20)] == [[], []]
    assert look(watch, dataclasses.replace(unknown, nodes=(l4(1),)), 30) == []
    (line,) = look(watch, dataclasses.replace(unknown, nodes=(l4(1),)), 40)
    assert "no node has as much: 10.0.1.1" in line


@pytest.mark.parametrize(
    ("pending", "is_waiting"),
    [
        ({"CPU": 0.5, "GPU": 1, "accelerator_type:H100": 0.001, "memory": 1e9}, True),
        ({"CPU": 0.5, "GPU": 1}, False),
        ({"CPU": 0.5, "GPU": 1, "accelerator_type:L4": 0.001}, False),
        ({"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001}, False),
    ],
)
def test_what_other_jobs_wait_for_is_theirs(pending: dict, is_waiting: bool):
    watch = PlacementWatch([ENCODER], placement=Placement(warn_seconds=1))
    there = state(HEAD, pending=(pending,))
    assert look(watch, there, 0) == []
    assert bool(look(watch, there, 1)) is is_waiting


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"max_encoders": 0}, "max_encoders=0: expected at least 1"),
        ({"accelerator_type": ""}, "accelerator_type='': expected a name"),
        ({"warn_seconds": 0}, "warn_seconds=0: expected more than 0"),
        (
            {"warn_seconds": 9, "fail_seconds": 8},
            "fail_seconds=8: expected at least warn_seconds=9",
        ),
    ],
)
def test_a_placement_out_of_bounds_names_field_and_value(values: dict, fault: str):
    with pytest.raises(ValueError, match=re.escape(fault)):
        Placement(**values)


def test_an_accelerator_type_is_one_of_rays_resources():
    assert accelerator(Placement(accelerator_type="L4")) == {"accelerator_type:L4": 0.001}
    assert accelerator(Placement()) == {}
