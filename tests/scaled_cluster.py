"""A Ray head with an autoscaler, which would start further nodes on this machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG
from ray.exceptions import RpcError

from tests.ports import free_port
from tests.waiting import WAIT_SECONDS

HEAD_TYPE = "ray.head.default"  # as the provider of nodes on this machine has it
CONFIG = {
    **BASE_READONLY_CONFIG,  # all that there must be
    "max_workers": 1,
    "idle_timeout_minutes": 1,
    "provider": {
        # By its module: for `fake_multinode` Ray's wheel lacks a file of defaults.
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "disable_node_updaters": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    },
    "available_node_types": {
        HEAD_TYPE: {"resources": {}, "node_config": {}, "max_workers": 0},
        "cpu_worker": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 1},
    },
    "head_node_type": HEAD_TYPE,
}


@contextmanager
def scaled_cluster() -> Iterator[str]:
    """host:port of one; its autoscaler is of version 2, as that of `ray up`."""
    port = free_port()
    # Ray's sockets are below it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        config = Path(folder) / "autoscaler.json"
        config.write_text(json.dumps(CONFIG))
        process = subprocess.Popen(
            [
                *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
                *(f"--port={port}", "--num-cpus=0", "--include-dashboard=false"),
                *(f"--autoscaling-config={config}", "--object-store-memory=100000000"),
                f"--temp-dir={folder}",
            ],
            env={
                **os.environ,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "AUTOSCALER_METRIC_PORT": str(free_port()),
                "RAY_AUTH_MODE": "disabled",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_NODE_TYPE_NAME": HEAD_TYPE,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait_until_there(f"127.0.0.1:{port}", process)
            yield f"127.0.0.1:{port}"
        finally:
            _kill_session(process.pid)
            process.wait(timeout=WAIT_SECONDS)


def _wait_until_there(address: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            if GcsClient(address).get_all_node_info(timeout=5):
                return
        except (RpcError, RuntimeError):
            assert process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "no head came"
        time.sleep(0.5)


def _kill_session(leader_pid: int) -> None:
    """Whatever Ray started in it and left."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == leader_pid:
                    os.kill(int(folder.name), signal.SIGKILL)
            except ProcessLookupError:
                continue
