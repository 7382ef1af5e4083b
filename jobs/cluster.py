"""Connects to a Ray cluster, or starts Ray on this machine for one command.

Knows nothing of what runs on it.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray
import ray.data

from engine.errors import ClipmillError

# Of the object store of a Ray that a command starts for itself, for each CPU: twice what blocks
# between the stages may take (`Resources.in_flight_bytes`), since those being written come on top.
OBJECT_STORE_BYTES_PER_CPU = 256 * 2**20
MIN_OBJECT_STORE_BYTES = 1 * 2**30
# Ray's own bound.
_MAX_OBJECT_STORE_SHARE = 0.3


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Be connected to Ray for the length of a block.

    Args:
        address: Of a cluster (`auto`, `host:6379`, `ray://host:10001`). None: the one that
            $RAY_ADDRESS names (Ray sets it within a submitted job), or a new one on this machine.
    """
    _quiet_console()
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
            object_store_memory=_object_store_bytes(),
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Workers import the packages from where this process did.
            runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
        )
    try:
        yield
    finally:
        ray.shutdown()


def _object_store_bytes() -> int:
    wanted = OBJECT_STORE_BYTES_PER_CPU * len(os.sched_getaffinity(0))
    most = int(_MAX_OBJECT_STORE_SHARE * psutil.virtual_memory().total)
    return min(max(wanted, MIN_OBJECT_STORE_BYTES), most)


def _quiet_console() -> None:
    """Leave stderr to the progress; Ray Data's own log file keeps everything."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([root, before] if before else [root])
