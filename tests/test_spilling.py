"""Tests of pipelines/cluster/spilling.py, with a Ray whose object store is small."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.cluster import spilling
from pipelines.cluster.spilling import SpillCount
from tests.waiting import WAIT_SECONDS

PROGRAM = """
import numpy as np
import ray

from pipelines.cluster.spilling import SpillCount

ray.init("local", num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
count = SpillCount()
before = count.num_bytes()
held = [ray.put(np.ones(30 * 2**20, np.uint8)) for _ in range(6)]
print(before, count.num_bytes(), SpillCount().num_bytes())
ray.shutdown()
print(count.num_bytes())
"""


def test_what_has_no_room_is_counted_from_its_making_on():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_SECONDS,
    )
    counts, without_ray = done.stdout.splitlines()[-2:]
    before, after, from_now = map(int, counts.split())
    assert before == from_now == 0
    assert 3 * 30 * 2**20 <= after < 8 * 30 * 2**20  # two at most fit, and each is written once
    assert without_ray == "None"


@pytest.mark.usefixtures("local_ray")
def test_where_less_was_spilled_than_before_a_node_is_lost(monkeypatch: pytest.MonkeyPatch):
    totals = [5, 9, 4]

    def reply(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(store_stats=SimpleNamespace(spilled_bytes_total=totals.pop(0)))

    monkeypatch.setattr(spilling, "get_memory_info_reply", reply)
    count = SpillCount()
    assert count.num_bytes() == 4
    assert count.num_bytes() is None
