"""The same job on this machine and, submitted, on a Ray cluster of three nodes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.checks.asking import NODE_SECONDS
from pipelines.metrics import RUN_END
from pipelines.runs.run_history import find_run
from pipelines.store import Store
from pipelines.store_places import store_label
from tests import encoded_rows
from tests.catalogs import scene_rows, stored_embeddings, write_rows
from tests.ray_nodes import RayNodes, ray_nodes
from tests.waiting import WAIT_SECONDS, wait_until

ROOT = Path(__file__).resolve().parent.parent


NUM_ROWS = 160
# A raylet that is gone is noticed after seconds, and no worker starts that nobody asked for.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_niceness": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}


class Cluster:
    """Three nodes that take jobs, two of them with a GPU that is none, and a catalog."""

    def __init__(self, folder: Path, *, nodes: RayNodes, options: list[str], log: Path) -> None:
        self.folder, self.nodes = folder, nodes
        self._options, self._log = options, log

    def options(self, store: str) -> list[str]:
        """Of a command with a store of that name."""
        return [*self._options, "--store", str(self.folder / store)]

    def num_encoded(self) -> int:
        """Rows that workers of the cluster have begun to encode."""
        return encoded_rows.rows_by_raylet(self._log).total()

    def encoding_pids(self) -> list[int]:
        """Of the raylets of nodes but the head whose workers have begun to encode rows."""
        rows = encoded_rows.rows_by_raylet(self._log)
        return [pid for pid in self.nodes.worker_pids if rows[pid]]

    def held(self, *, after_rows: int) -> AbstractContextManager[None]:
        """Within it, batches that workers begin after so many rows wait for its end."""
        return encoded_rows.held(self._log, after_rows=after_rows)

    def clipmill(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command that asks the job server, from its beginning to its end."""
        return subprocess.run(
            self._words(words), cwd=ROOT, capture_output=True, text=True, check=False
        )

    def watched(self, *words: str) -> subprocess.Popen[str]:
        """The same, running."""
        return subprocess.Popen(
            self._words(words),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _words(self, words: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "jobs.cli", *words, "--address", self.nodes.jobs]


@pytest.fixture(scope="module")
def cluster_of_three(
    tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path, engines_dir: Path
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    catalog_dir = write_rows(folder / "catalog", scene_rows(NUM_ROWS), num_files=4)
    options = [
        *("--catalog", str(catalog_dir), "--checkpoint", str(checkpoint_dir)),
        *("--engines", str(engines_dir), "--backend", "onnxruntime"),
        *("--batch-rows", "8", "--rows-per-file", "32", "--num-encoders", "2"),
        # One on a node: two are on two of the three, so that one is not on the head.
        *("--encoder-cpus", "0.6", "--decode-cpus", "0.4"),
    ]
    log = folder / "encoded-rows"
    environment = {**QUICK, **encoded_rows.environment(log)}
    with ray_nodes(3, num_gpus=1, environment=environment) as nodes:
        yield Cluster(folder, nodes=nodes, options=options, log=log)


def test_a_night_is_submitted_left_and_found_again_and_a_lost_node_costs_no_key(
    cluster_of_three: Cluster,
):
    cluster, words = cluster_of_three, cluster_of_three.options("far")
    # At half of them, so that there is work to lose and to do, however slowly this test goes on.
    with cluster.held(after_rows=NUM_ROWS):
        left = cluster.watched("submit", "nightly", *words, "--json")
        wait_while_running(
            lambda: cluster.num_encoded() > NUM_ROWS and len(cluster.encoding_pids()) > 0, left
        )
        left.send_signal(signal.SIGINT)
        out, err = left.communicate(timeout=WAIT_SECONDS)
        assert (left.returncode, out) == (130, ""), err
        (job_id,) = re.findall(r"clipmill jobs attach (\S+)", err)
        os.kill(cluster.encoding_pids()[0], signal.SIGKILL)
        refused = cluster.clipmill("submit", "nightly", *words)
        assert refused.returncode == 1
        assert f"{job_id} works on it already" in refused.stderr

    found = cluster.clipmill("jobs", "attach")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert (report["outcome"], report["snapshot"]) == ("committed", 1)
    assert len(report["indexes"]) == 2
    listed = json.loads(cluster.clipmill("jobs", "list", "--json").stdout)
    assert [(job["job_id"], job["status"], job["exit_code"]) for job in listed] == [
        (job_id, "SUCCEEDED", 0)
    ]

    # The same words without `submit`, on this machine.
    here = cluster.options("here")
    subprocess.run([sys.executable, "-m", "jobs.embed", *here], cwd=ROOT, check=True)
    for modality in ("image", "text"):
        one = stored_embeddings(cluster.folder / "here", modality=modality)
        three = stored_embeddings(cluster.folder / "far", modality=modality)
        assert set(one) == set(three) == {row["key"] for row in scene_rows(NUM_ROWS)}
        assert all(np.allclose(one[key], three[key], atol=1e-5) for key in one)


def test_rays_own_client_submits_it_too(cluster_of_three: Cluster):
    submitted = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "ray"), "job", "submit"),
            *("--address", cluster_of_three.nodes.jobs, "--working-dir", str(ROOT), "--"),
            *("python", "-m", "jobs.nightly", *cluster_of_three.options("far")),
        ],
        cwd=cluster_of_three.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "snapshot 1" in submitted.stdout
    keys = {row["key"] for row in scene_rows(NUM_ROWS)}
    assert set(stored_embeddings(cluster_of_three.folder / "far", modality="image")) == keys


def test_a_job_that_is_stopped_ends_with_1_for_who_watches_it(cluster_of_three: Cluster):
    cluster, words = cluster_of_three, cluster_of_three.options("stopped")
    before = cluster.num_encoded()
    store = str(cluster.folder / "stopped")
    with cluster.held(after_rows=0), ThreadPoolExecutor() as scraper:
        submitted = cluster.clipmill("submit", "embed", *words, "--detach")
        job_id = submitted.stdout.strip()
        watched = cluster.watched("jobs", "attach", job_id)
        wait_while_running(lambda: cluster.num_encoded() > before, watched)
        # From now on: what a driver tells last is forgotten soon after it has ended.
        told = scraper.submit(
            wait_until_told, cluster.nodes, {"store": store_label(store), "outcome": "stopped"}
        )
        stopped = cluster.clipmill("jobs", "stop", job_id)
        assert stopped.returncode == 0, stopped.stderr
        assert stopped.stdout.startswith(f"{job_id}: STOPPED")
        _, err = watched.communicate(timeout=WAIT_SECONDS)
        assert watched.returncode == 1
        assert f"{job_id} was stopped" in err
        told.result()
    stopped_run = find_run(Store(store), None)
    assert (stopped_run.status, stopped_run.error) == ("stopped", "Terminated")


def wait_until_told(nodes: RayNodes, end: dict[str, str]) -> None:
    wait_until(lambda: any(end.items() <= labels.items() for labels in ends_told(nodes)), every=0.5)


def ends_told(nodes: RayNodes) -> Iterator[dict[str, str]]:
    """Labels of the ends of runs, as Prometheus would scrape them now."""
    for target in nodes.metrics:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:  # of the node that was lost
            continue
        for family in text_string_to_metric_families(text):
            if family.name == f"ray_{RUN_END.name}":
                yield from (sample.labels for sample in family.samples)


def wait_while_running(condition: Callable[[], bool], watched: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if watched.poll() is not None or time.monotonic() > deadline:
            watched.kill()
            out, err = watched.communicate()
            raise AssertionError(f"not in time, or it ended: {out}\n{err}")
        time.sleep(0.05)


HOLD_ALL_GPUS = """
import sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(sys.argv[1], namespace="held", log_to_driver=False)

@ray.remote(num_gpus=1, num_cpus=1, lifetime="detached")
class Busy:
    def ready(self):
        return True

for node in ray.nodes():
    if node["Resources"].get("GPU"):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = node["NodeID"]
        ray.get(Busy.options(scheduling_strategy=there, name=name).remote().ready.remote())
"""


def test_nodes_whose_gpus_are_in_use_are_not_called_wrong_and_not_waited_for():
    with ray_nodes(3, num_gpus=1, takes_jobs=False) as nodes:
        subprocess.run([sys.executable, "-c", HOLD_ALL_GPUS, nodes.gcs], cwd=ROOT, check=True)
        started = time.monotonic()
        words = [sys.executable, "-m", "jobs.doctor", "--address", nodes.gcs, "--json"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    of_nodes = [check for check in checks if check["name"].startswith("node ")]
    assert sorted(check["verdict"] for check in of_nodes) == ["ok", "unseen", "unseen"]
    for check in of_nodes:
        assert ("its GPUs are in use" in check["found"]) == (check["verdict"] == "unseen")
    assert seconds < NODE_SECONDS
