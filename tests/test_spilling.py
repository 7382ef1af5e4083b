"""Tests of pipelines/cluster/spilling.py, with a Ray whose object store is small."""

import subprocess
import sys

PROGRAM = """
import numpy as np
import ray
from ray.util.client import ray as client

from pipelines.cluster.spilling import spilled_bytes

ray.init("local", num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
before = spilled_bytes()
held = [ray.put(np.ones(30 * 2**20, np.uint8)) for _ in range(6)]
print(before, spilled_bytes())
client.is_connected = lambda: True
print(spilled_bytes())
"""


def test_what_has_no_room_is_counted():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120
    )
    counts, from_afar = done.stdout.splitlines()[-2:]
    before, after = map(int, counts.split())
    assert before == 0
    assert 3 * 30 * 2**20 <= after < 8 * 30 * 2**20  # two at most fit, and each is written once
    assert from_afar == "None"
