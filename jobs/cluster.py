"""Connects to a Ray cluster, or starts Ray on this machine for one command.

Knows nothing of what runs on it.
"""

import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._common.utils import get_system_memory
from ray._private.utils import get_num_cpus

from engine.errors import ClipmillError
from jobs.stopping import sigterm_kept

# Of the object store of a Ray that a command starts for itself, for each CPU: twice what blocks
# between the stages may take (`IN_FLIGHT_BYTES_PER_CPU`), since those being written come on top.
OBJECT_STORE_BYTES_PER_CPU = 512 * 2**20
MIN_OBJECT_STORE_BYTES = 1 * 2**30
# That may idle, for each CPU: as many as run at once by the smallest share of `Resources`. By Ray's
# own rule half of those that read end while an encoder starts, and are started anew. Without that,
# 19,057 images/s became 23,326 and 23,699 (H200 with 16 cores, ViT-B/32 in fp16, 2026-11-29).
IDLE_WORKERS_PER_CPU = 4
# Of what is free where Ray keeps it, and of memory (Ray's own bound).
_MAX_SHM_SHARE, _MAX_MEMORY_SHARE = 0.9, 0.3
_SHM_DIR = "/dev/shm"
# How a run ended is exported within 10 s, and scraped within the 10 s that README names.
LAST_SCRAPE_SECONDS = 22.0


@contextmanager
def ray_cluster(address: str | None, *, metrics_port: int | None = None) -> Iterator[None]:
    """Be connected to Ray for the length of a block.

    Args:
        address: Of a cluster (`auto`, `host:6379`, `ray://host:10001`). None: the one that
            $RAY_ADDRESS names (Ray sets it within a submitted job), or a new one on this machine.
        metrics_port: Where a new one serves its metrics; None: any free port.
    """
    named = address or os.environ.get("RAY_ADDRESS", "")
    if named.startswith(("http://", "https://")):
        raise ValueError(
            f"address {named}: that of a job server, which `clipmill submit COMMAND ...` asks; "
            "without `submit` leave it out (unset RAY_ADDRESS) to start Ray on this machine"
        )
    _quiet_console()
    if metrics_port is not None:
        _check_metrics_port(metrics_port, joins=address or os.environ.get("RAY_ADDRESS"))
    with sigterm_kept():
        _connect(address, metrics_port=metrics_port)
    try:
        yield
    finally:
        if metrics_port is not None:
            time.sleep(LAST_SCRAPE_SECONDS)
        ray.shutdown()


def _connect(address: str | None, *, metrics_port: int | None) -> None:
    if address or os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ClipmillError(
                f"no Ray cluster answers at {address or os.environ['RAY_ADDRESS']} ({error}); "
                "check the address, or leave it out to start Ray on this machine"
            ) from error
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            "local",
            include_dashboard=False,
            _metrics_export_port=metrics_port,
            num_cpus=_num_cpus(),
            object_store_memory=_object_store_bytes(),
            log_to_driver=False,
            logging_level=logging.ERROR,
            _system_config={"num_workers_soft_limit": IDLE_WORKERS_PER_CPU * _num_cpus()},
            # Workers import the packages from where this process did.
            runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
        )


def check_metrics_port(port: int | None, *, address: str | None) -> None:
    """See that `ray_cluster` could serve metrics there, before anything is begun.

    Raises:
        ValueError: It is no such port, or no Ray would be started.
        ClipmillError: It is taken.
    """
    if port is not None:
        _check_metrics_port(port, joins=address or os.environ.get("RAY_ADDRESS"))


def _check_metrics_port(port: int, *, joins: str | None) -> None:
    if joins:
        raise ValueError(
            f"--metrics-port {port}: the cluster at {joins} has ports of its own, which its head "
            "lists in Ray's folder (prom_metrics_service_discovery.json); leave it out"
        )
    if not 1024 <= port <= 65535:
        raise ValueError(f"--metrics-port {port}: expected 1024 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ClipmillError(
                f"--metrics-port {port}: {error.strerror}; name one that is free"
            ) from error


def _num_cpus() -> int:
    """Those that this process may use: Ray alone knows a container's share, and no affinity."""
    return max(1, min(len(os.sched_getaffinity(0)), int(get_num_cpus())))


def _object_store_bytes() -> int:
    wanted = OBJECT_STORE_BYTES_PER_CPU * _num_cpus()
    # A container may see less than its machine has. Where it has less than the minimum, Ray takes a
    # disk, as it would without us.
    shm_bytes = int(_MAX_SHM_SHARE * shutil.disk_usage(_SHM_DIR).free)
    most = min(int(_MAX_MEMORY_SHARE * get_system_memory()), max(shm_bytes, MIN_OBJECT_STORE_BYTES))
    return min(max(wanted, MIN_OBJECT_STORE_BYTES), most)


def _quiet_console() -> None:
    """Leave stderr to the progress; Ray Data's own log file keeps everything."""
    import ray.data  # slow, and commands without a cluster do without

    for handler in logging.getLogger(ray.data.__name__).handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([root, before] if before else [root])
