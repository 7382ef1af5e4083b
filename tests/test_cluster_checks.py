"""Tests of jobs/checks/cluster.py: what is said of a cluster's nodes, by what they answered."""

from typing import Any

import pytest

from engine.errors import ClipmillError
from jobs.checks.asking import NodeAnswer
from jobs.checks.check import Check
from jobs.checks.cluster import ray_checks

GOOD = [
    Check(name="gpu", verdict="ok", found="one H200"),
    Check(name="backends", verdict="ok", found="fp8 by tensorrt", is_needed=True),
]
BAD = Check(name="packages", verdict="wrong", found="ray 2.5", mend="pip ...", is_needed=True)


def test_each_node_of_a_cluster_is_told():
    nodes = [
        ("head: 2 CPUs", NodeAnswer(found=(*GOOD, BAD))),
        ("gpu-1: 16 CPUs, 1 GPUs", NodeAnswer(found=tuple(GOOD))),
    ]
    checks = ray_checks("head:6379", nodes=lambda address: nodes)
    assert [check.name for check in checks] == [
        *("ray", "packages of head", "node head", "node gpu-1"),
    ]
    assert "a cluster of 2 nodes answers at head:6379" in checks[0].found
    assert checks[1].stops
    assert checks[3].found == "gpu-1: 16 CPUs, 1 GPUs; one H200; fp8 by tensorrt"


def test_a_node_that_cannot_look_stops():
    nodes = [("head: 2 CPUs", NodeAnswer(fault="ModuleNotFoundError: jobs"))]
    checks = ray_checks("a", nodes=lambda _: nodes)
    assert checks[1].stops
    assert "ModuleNotFoundError: jobs" in checks[1].found
    assert "--working-dir" in checks[1].mend


def test_a_node_that_hangs_is_wrong_beside_what_else_is():
    hung = NodeAnswer(found=(BAD,), hung="its look at its GPUs did not end within 120 s")
    _, packages, node = ray_checks("a", nodes=lambda _: [("gpu-1: 16 CPUs, 1 GPUs", hung)])
    assert packages.name == "packages of gpu-1"
    assert (node.name, node.stops) == ("node gpu-1", True)
    assert node.found.endswith("; its look at its GPUs did not end within 120 s")
    assert "nvidia-smi" in node.mend


def test_a_busy_node_is_not_called_wrong():
    busy = NodeAnswer(found=(BAD,), unseen="its GPUs are in use, and were not looked at")
    nodes = [("gpu-1: 16 CPUs, 1 GPUs", busy), ("gpu-1: 16 CPUs, 1 GPUs", NodeAnswer())]
    checks = ray_checks("a", nodes=lambda _: nodes)
    assert [check.verdict for check in checks] == ["ok", "wrong", "unseen", "ok"]
    assert checks[1].name == "packages of gpu-1"
    assert not checks[2].stops
    assert checks[2].found == "gpu-1: 16 CPUs, 1 GPUs; its GPUs are in use, and were not looked at"


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ClipmillError("no Ray cluster answers at a"), "missing"),
        (RuntimeError("Version mismatch"), "wrong"),
    ],
)
def test_a_cluster_that_does_not_answer_stops(error, verdict):
    def fail(address: str) -> Any:
        raise error

    (check,) = ray_checks("a", nodes=fail)
    assert (check.verdict, check.found, check.stops) == (verdict, str(error), True)


def test_without_an_address_commands_start_ray_here():
    (check,) = ray_checks(None, nodes=lambda _: pytest.fail("nobody is asked"))
    assert check.verdict == "ok"
