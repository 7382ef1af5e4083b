"""A Ray cluster of several nodes on this machine, as a process that a test starts and ends.

Run as a script it prints one JSON line with the addresses and the raylets, again after each line
that it is given (the raylet to replace by a new node), and ends when stdin closes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from tests.ports import free_port
from tests.waiting import WAIT_SECONDS

ROOT = Path(__file__).resolve().parent.parent
CPUS_PER_NODE = 1
OBJECT_STORE_BYTES = 256 * 2**20
NUM_START_TRIES = 5


class RayNodes:
    """A running cluster."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._said = self._answer()

    @property
    def gcs(self) -> str:
        """host:port to join."""
        return str(self._said["gcs"])

    @property
    def jobs(self) -> str:
        """http://host:port to submit jobs to."""
        return str(self._said["jobs"])

    @property
    def head_pid(self) -> int:
        """Of the raylet of the head node."""
        return int(self._said["head_pid"])

    @property
    def worker_pids(self) -> list[int]:
        """Of the raylets of the other nodes."""
        return [int(pid) for pid in self._said["worker_pids"]]

    @property
    def metrics(self) -> list[str]:
        """host:port of each node that is alive, where its metrics are scraped."""
        return [str(target) for target in self._said["metrics"]]

    def replace(self, pid: int) -> None:
        """Start a node in the place of one whose raylet was killed."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pid}\n")
        self._process.stdin.flush()
        self._said = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster did not start"
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def ray_nodes(
    num_nodes: int,
    *,
    takes_jobs: bool = True,
    num_gpus: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Iterator[RayNodes]:
    """A running cluster.

    Args:
        num_nodes: With the head.
        takes_jobs: Whether jobs can be submitted, which takes Ray's dashboard, and with it time.
        num_gpus: That each node but the head says it has.
        environment: Variables that its processes have besides those of this one.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, __file__, str(num_nodes), str(int(takes_jobs)), str(num_gpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                # A submitted job's `python` is the one with the packages, as on a real node.
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "RAY_USAGE_STATS_ENABLED": "0",
                # A file there names the cluster that drivers of jobs are told of. Ray writes it as
                # any head starts, and removes it as any ends.
                "RAY_TMPDIR": folder,
                **(environment or {}),
            },
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield RayNodes(process)
        finally:
            process.stdin.close()
            process.wait(timeout=WAIT_SECONDS)
            process.stdout.close()


def _wait_until_jobs_are_taken(address: str) -> None:
    """The agent that starts jobs comes up some seconds after the node."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
        except (RuntimeError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


def _serve(num_nodes: int, *, takes_jobs: bool, num_gpus: int) -> None:
    printed = os.dup(1)
    os.dup2(2, 1)  # Ray prints to stdout as it starts
    port = free_port()
    cluster = Cluster()
    if takes_jobs:
        _add_node(cluster, include_dashboard=True, dashboard_port=port)
    else:
        # Each further process of the head takes seconds to start.
        _add_node(cluster, include_dashboard=False, include_log_monitor=False, no_monitor=True)
    for _ in range(num_nodes - 1):
        _add_node(cluster, num_gpus=num_gpus)
    cluster.wait_for_nodes()
    if takes_jobs:
        _wait_until_jobs_are_taken(f"http://127.0.0.1:{port}")

    def say() -> None:
        said = {
            "gcs": cluster.address,
            "jobs": f"http://127.0.0.1:{port}",
            "head_pid": _raylet_pid(cluster.head_node),
            "worker_pids": sorted(map(_raylet_pid, cluster.worker_nodes)),
            "metrics": [
                f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
                for node in cluster.global_state.node_table()
                if node["Alive"]
            ],
        }
        os.write(printed, (json.dumps(said) + "\n").encode())

    say()
    for line in sys.stdin:
        (lost,) = [node for node in cluster.worker_nodes if _raylet_pid(node) == int(line)]
        cluster.remove_node(lost, allow_graceful=False)
        _add_node(cluster, num_gpus=num_gpus)
        say()
    cluster.shutdown()


def _add_node(cluster: Cluster, **options: Any) -> None:
    """Start a node, the first one as the head; again if it took longer than Ray waits for one."""
    for num_left in reversed(range(NUM_START_TRIES)):
        try:
            cluster.add_node(
                num_cpus=CPUS_PER_NODE,
                object_store_memory=OBJECT_STORE_BYTES,
                # The default port can be taken: by another node, or by a test's own Ray.
                dashboard_agent_listen_port=free_port(),
                **options,
            )
        except Exception as error:
            if not num_left or "timed out during startup" not in str(error):
                raise
        else:
            return


def _raylet_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), takes_jobs=sys.argv[2] == "1", num_gpus=int(sys.argv[3]))
