"""Tests of jobs/cluster.py: a Ray that is joined, one that a command starts, and their sizes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import cluster
from pipelines.stages import IN_FLIGHT_BYTES_PER_CPU
from tests.ray_nodes import ray_nodes

ROOT = Path(__file__).resolve().parent.parent


def test_the_address_of_a_job_server_is_not_joined(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    for address in ("https://head", None):
        with (
            pytest.raises(ValueError, match="clipmill submit COMMAND"),
            cluster.ray_cluster(address),
        ):
            raise AssertionError("joined")


JOIN_AND_LEAVE = """
import sys
import ray
from jobs.cluster import ray_cluster

for _ in range(2):
    with ray_cluster(sys.argv[1]):
        print(int(ray.cluster_resources()["CPU"]))
    assert not ray.is_initialized()
"""


def test_an_address_is_joined_and_left_running():
    with ray_nodes(1, takes_jobs=False) as nodes:
        joined = subprocess.run(
            [sys.executable, "-c", JOIN_AND_LEAVE, nodes.gcs],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert joined.returncode == 0, joined.stderr
    assert joined.stdout.split() == ["1", "1"]


ON_ONE_CPU = """
import os
import tempfile
import time
import psutil
import ray
from jobs.cluster import ray_cluster

@ray.remote(num_cpus=0.25)
def worker(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    while len(os.listdir(folder)) < 4:
        time.sleep(0.1)
    return psutil.Process().create_time()

def four_at_once():
    with tempfile.TemporaryDirectory() as folder:
        return ray.get([worker.remote(folder) for _ in range(4)])

os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
with ray_cluster(None):
    print(int(ray.cluster_resources()["CPU"]))
    four_at_once()
    time.sleep(3)  # Ray ends what it has too many of after 1 s
    later = time.time()
    print(sum(started > later for started in four_at_once()))
"""


def test_a_ray_of_its_own_has_the_cpus_that_the_process_may_use_and_keeps_idle_workers():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started = subprocess.run(
        [sys.executable, "-c", ON_ONE_CPU],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert started.returncode == 0, started.stderr
    cpus, num_new_workers = map(int, started.stdout.split())
    assert cpus == 1
    assert num_new_workers == 0


@pytest.mark.parametrize(
    ("num_cores", "total_gib", "shm_gib", "expected_gib"),
    [
        (2, 24, 12, 1),
        (16, 128, 64, 8),
        (64, 32, 30, 0.3 * 32),
        (16, 128, 3, 0.9 * 3),
        (64, 256, 0.0625, 1),
        (2, 2, 1, 0.3 * 2),
    ],
)
def test_the_object_store_holds_more_than_what_is_in_flight(
    monkeypatch: pytest.MonkeyPatch,
    num_cores: int,
    total_gib: int,
    shm_gib: float,
    expected_gib: float,
):
    usage = SimpleNamespace(free=shm_gib * 2**30)
    monkeypatch.setattr(cluster, "_num_cpus", lambda: num_cores)
    monkeypatch.setattr(cluster, "get_system_memory", lambda: total_gib * 2**30)
    monkeypatch.setattr(cluster.shutil, "disk_usage", lambda folder: usage)
    assert cluster._object_store_bytes() == int(expected_gib * 2**30)
    assert 2 * IN_FLIGHT_BYTES_PER_CPU <= cluster.OBJECT_STORE_BYTES_PER_CPU
