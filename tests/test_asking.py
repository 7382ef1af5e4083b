"""Tests of jobs/checks/asking.py: what nodes that answer late are taken for, without Ray."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import ray

from jobs.checks import asking
from jobs.checks.asking import NodeAnswer, nodes_of
from jobs.checks.check import Check

OF_CPUS = Check(name="packages", verdict="ok", found="all")
OF_GPUS = Check(name="gpu", verdict="ok", found="one H200")
CPUS, GPUS = asking.cpu_checks, asking.gpu_checks
HEAD, WITH_GPU = {}, {"CPU": 16.0, "GPU": 1.0}
BUSY = "it did not answer within 120 s: it may be busy"
IN_USE = "its GPUs are in use, and were not looked at"


def hung(what: str) -> str:
    return f"its look at {what} did not end within 120 s, and waits for nobody"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NodeAnswer]:
    """A cluster of one node: what it has, what of it is free before and after, what is done."""

    def asked(has: dict, *, before: Any, after: Any, done: list) -> NodeAnswer:
        node = {"Alive": True, "NodeID": "ab", "NodeManagerHostname": "gpu-1", "Resources": has}
        answers = {CPUS: [OF_CPUS], asking.node_checks: [OF_CPUS], GPUS: [OF_GPUS]}
        free = iter([before, after])
        monkeypatch.setattr(asking, "ray_cluster", lambda address: nullcontext())
        monkeypatch.setattr(ray, "nodes", lambda: [node])
        monkeypatch.setattr(asking.client, "is_connected", lambda: before is None)
        monkeypatch.setattr(asking, "available_resources_per_node", lambda: {"ab": next(free)})
        monkeypatch.setattr(asking, "_asked", lambda node_id, checks, num_gpus: checks)
        monkeypatch.setattr(
            ray, "wait", lambda asked, **_: ([one for one in asked if one in done], [])
        )
        monkeypatch.setattr(ray, "get", answers.__getitem__)
        ((line, answer),) = nodes_of("head:6379")
        assert line.startswith("gpu-1: ")
        return answer

    return asked


@pytest.mark.parametrize(
    ("has", "before", "after", "done", "found", "rest"),
    [
        (WITH_GPU, WITH_GPU, WITH_GPU, [CPUS, GPUS], [OF_CPUS, OF_GPUS], {}),
        (WITH_GPU, {"CPU": 1.0}, WITH_GPU, [CPUS], [OF_CPUS], {"unseen": IN_USE}),
        # Placed, it holds its share.
        (WITH_GPU, WITH_GPU, {"GPU": 0.999}, [CPUS], [OF_CPUS], {"hung": hung("its GPUs")}),
        # Another one was faster.
        (WITH_GPU, WITH_GPU, {"CPU": 16.0}, [CPUS], [OF_CPUS], {"unseen": IN_USE}),
        (WITH_GPU, WITH_GPU, WITH_GPU, [GPUS], [], {"hung": hung("itself")}),
        # What runs there may be what it waits for.
        (WITH_GPU, WITH_GPU, {"CPU": 1.0}, [GPUS], [], {"unseen": BUSY}),
        (WITH_GPU, WITH_GPU, {}, [], [], {"unseen": BUSY}),
        (HEAD, {}, {}, [], [], {"hung": hung("itself")}),
        # From afar nobody knows.
        (WITH_GPU, None, None, [], [], {"unseen": BUSY}),
        (WITH_GPU, None, None, [CPUS], [OF_CPUS], {"unseen": IN_USE}),
    ],
)
def test_what_could_not_be_placed_is_busy_and_what_could_be_and_does_not_end_hangs(
    ask: Callable[..., NodeAnswer],
    has: dict,
    before: Any,
    after: Any,
    done: list,
    found: list,
    rest: dict,
):
    answer = ask(has, before=before, after=after, done=done)
    assert answer == NodeAnswer(found=tuple(found), **rest)
