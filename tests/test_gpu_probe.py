"""Looking at a GPU of the cluster: one worker for all looks, gone afterwards."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.device import has_driver
from engine.errors import DeviceError
from pipelines.cluster import gpu_probe
from pipelines.cluster.cluster_state import wait_for_place
from pipelines.cluster.placement import Placement
from tests.waiting import WAIT_SECONDS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(has_driver(), reason="with a GPU, Ray's workers see it")
def test_gpus_that_ray_counts_and_its_workers_do_not_see_are_no_reason_to_use_cpus() -> None:
    """In a process of its own, since Ray is started with a GPU that is none."""
    script = """
import ray
from engine.errors import ClipmillError
from pipelines import engines
from pipelines.cluster import cluster_state, gpu_probe, resources
from pipelines.cluster.placement import Placement
from pipelines.snapshots import EngineRecord

ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
engine = EngineRecord(engine_id="fp8-0", checkpoint="a", revision=None)
busy = ray.remote(num_gpus=1, num_cpus=0)(lambda: __import__("time").sleep(600))
for wait in (False, True):
    if wait:
        cluster_state.LOOK_SECONDS = 0.5
        holding = busy.remote()
        while ray.available_resources().get("GPU", 0) > 0:
            pass
    try:
        patience = Placement(warn_seconds=1, fail_seconds=8 if wait else 300)
        with gpu_probe.gpu_probe(patience) as look:
            print(engines.chosen_backend("auto", engine=engine, look=look))
    except ClipmillError as error:
        print(error)
print(engines.chosen_backend("onnxruntime", engine=engine, look=None))
by_torch = engines.Execution(backend="torch", decoder="cpu")
print(resources.num_workers(resources.Resources(), execution=by_torch)["encode"])
print(resources.num_workers(resources.Resources(encoder_gpus=0.25), execution=by_torch)["encode"])
for wanted in (resources.Resources(encoder_gpus=2.0), resources.Resources(num_encoders=3)):
    try:
        resources.check_room(wanted, execution=by_torch)
    except ValueError as error:
        print(error)
ray.shutdown()
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert "Ray counts 1 GPUs, but a worker that was given one sees none" in lines[0]
    assert lines[1].startswith("a look at a GPU has waited ")
    assert " s for a GPU; the nodes that have as much are in use: " in lines[1]
    assert "2 CPU, 1 GPU, free 2 CPU, 0 GPU; there is no autoscaler; wait for" in lines[1]
    assert "a look at a GPU has waited" in ran.stderr
    assert lines[2:5] == ["onnxruntime", "1", "4"]
    assert "encoder_gpus=2: the cluster's GPUs have room for 0 such encoders" in lines[5]
    assert "num_encoders=3, encoder_gpus=1: the cluster's GPUs have room for 1" in lines[6]


def fail() -> None:
    raise DeviceError("no such card")


def test_one_worker_is_asked_again_and_then_ends(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_probe, "_PROBE_GPUS", 0)  # there is none here
    watched = []

    def wait(references: list[Any], **options: Any) -> None:
        watched.append(references)
        wait_for_place(references, **options)

    monkeypatch.setattr(gpu_probe, "wait_for_place", wait)
    with gpu_probe.gpu_probe(Placement()) as look:
        pid = look(os.getpid)
        with pytest.raises(DeviceError, match="no such card"):
            look(fail)
        assert look(os.getpid) == pid != os.getpid()
    # A worker whose node is gone needs another place: each look waits with a message and an end.
    assert len(watched) == 3
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(WAIT_SECONDS)
    assert not psutil.pid_exists(pid)
