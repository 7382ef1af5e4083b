"""A Ray cluster of several nodes on this machine, as a process that a test starts and ends.

Run as a script it prints one JSON line with the addresses, and ends when stdin closes.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parent.parent
CPUS_PER_NODE = 1
START_SECONDS = 60


@contextmanager
def ray_nodes(num_nodes: int) -> Iterator[dict[str, str]]:
    """Addresses of a running cluster: `gcs` host:port and `jobs` http://host:port."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(num_nodes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            # A submitted job's `python` is the one with the packages, as on a real node.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "the cluster did not start"
        yield json.loads(line)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_jobs_are_taken(address: str) -> None:
    """The agent that starts jobs comes up some seconds after the node."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
        except (RuntimeError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


def _serve(num_nodes: int) -> None:
    printed = os.dup(1)
    os.dup2(2, 1)  # Ray prints to stdout as it starts
    port = _free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": CPUS_PER_NODE,
            "include_dashboard": True,
            "dashboard_port": port,
            "dashboard_agent_listen_port": _free_port(),
            "object_store_memory": 256 * 2**20,
        },
    )
    for _ in range(num_nodes - 1):
        cluster.add_node(
            num_cpus=CPUS_PER_NODE,
            object_store_memory=256 * 2**20,
            # The default port can be taken: by another node, or by a test's own Ray.
            dashboard_agent_listen_port=_free_port(),
        )
    cluster.wait_for_nodes()
    addresses = {"gcs": cluster.address, "jobs": f"http://127.0.0.1:{port}"}
    _wait_until_jobs_are_taken(addresses["jobs"])
    os.write(printed, (json.dumps(addresses) + "\n").encode())
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
