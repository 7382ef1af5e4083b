"""A submitted job that loses one of its three nodes while nobody looks: every key once."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.catalogs import scene_rows, stored_rows, write_rows
from tests.ray_nodes import RayNodes, ray_nodes

ROOT = Path(__file__).resolve().parent.parent
NUM_ROWS = 600
JOB_SECONDS = 120
ENVIRONMENT = {
    # A raylet that is gone is noticed after seconds, not after half a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_niceness": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """Two of the three say that they have a GPU."""
    with ray_nodes(3, num_gpus=1, environment=ENVIRONMENT) as made:
        yield made


def test_a_job_that_loses_a_node_has_every_key_once(
    nodes: RayNodes, tmp_path: Path, checkpoint_dir: Path, engines_dir: Path
):
    rows = scene_rows(NUM_ROWS)
    catalog_dir = write_rows(tmp_path / "catalog", rows, num_files=3)
    store_dir = tmp_path / "store"
    words = [
        *(sys.executable, "-m", "jobs.embed", "--catalog", str(catalog_dir)),
        *("--store", str(store_dir), "--checkpoint", str(checkpoint_dir)),
        *("--engines", str(engines_dir), "--backend", "onnxruntime"),
        *("--batch-rows", "16", "--rows-per-file", "64", "--num-encoders", "2"),
    ]
    job = JobSubmissionClient(nodes.jobs).submit_job(
        entrypoint=" ".join(words), runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    # Whoever submitted it is gone; another finds it, by its id or in the list.
    client = JobSubmissionClient(nodes.jobs)
    assert job in {found.submission_id for found in client.list_jobs()}
    wait_until(lambda: bool(list(store_dir.glob("embeddings/*/*.parquet"))), client, job)
    lost = next(raylet for raylet in nodes.worker_pids if has_encoder(raylet))
    os.kill(lost, signal.SIGKILL)
    assert not (store_dir / "snapshots").exists(), "it was done before the node was lost"
    wait_until(lambda: client.get_job_status(job).is_terminal(), client, job)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    assert "snapshot 1 committed" in client.get_job_logs(job)
    places = [(row["key"], row["modality"]) for row in stored_rows(store_dir)]
    assert sorted(places) == sorted(
        (row["key"], modality) for row in rows for modality in ("image", "text")
    )
    assert not stored_rows(store_dir, kind="rejects")


def wait_until(is_so, client: JobSubmissionClient, job: str) -> None:
    deadline = time.monotonic() + JOB_SECONDS
    while not is_so():
        assert client.get_job_status(job) != JobStatus.FAILED, client.get_job_logs(job)
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.1)


def has_encoder(raylet: int) -> bool:
    """Whether one of a node's workers is an encode actor."""
    return any(
        "EncodeActor" in " ".join(child.cmdline()) for child in psutil.Process(raylet).children()
    )
