"""Checks what a machine, or the container here, has of cores, memory, disks and open files.

Knows nothing of GPUs or of Ray's cluster.
"""

import os
import resource
import shutil
import tempfile
from pathlib import Path

import psutil

from jobs.checks.check import Check
from jobs.checks.limits import cpu_limit, memory_limit
from jobs.cluster import MIN_OBJECT_STORE_BYTES, OBJECT_STORE_BYTES_PER_CPU

# Processes of a run of small towers on two cores took 1.7 GiB (`clipmill bench pipeline`, README).
MIN_MEMORY_BYTES = 2 * 2**30
MIN_DISK_BYTES = 2**30
# Beyond it Ray keeps nothing on that disk: its local_fs_capacity_threshold.
MAX_DISK_SHARE = 0.95
# Below it Ray warns of connections that fail; it raises the limit as far as it may, to 65,536.
MIN_OPEN_FILES = 4096
SHM_DIR = Path("/dev/shm")
GIB = 2**30


def machine_checks(*, root: Path = Path("/")) -> list[Check]:
    """All of this machine; of a container here, what it may take.

    Args:
        root: See `memory_limit`.
    """
    num_cores = len(os.sched_getaffinity(0))
    num_cpus = min(num_cores, cpu_limit(root) or num_cores)
    memory, limit = psutil.virtual_memory(), memory_limit(root)
    free_bytes, total_bytes = memory.available, memory.total
    is_limited = limit is not None and limit.limit_bytes < total_bytes
    if limit is not None and is_limited:
        free_bytes, total_bytes = min(free_bytes, limit.free_bytes), limit.limit_bytes
    disk_dir = tempfile.gettempdir()
    disk = shutil.disk_usage(disk_dir)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    checks = [
        memory_check(
            num_cpus, free_bytes=free_bytes, total_bytes=total_bytes, is_limited=is_limited
        ),
        disk_check(disk_dir, free_bytes=disk.free, total_bytes=disk.total),
        open_files_check(most_files),
    ]
    if SHM_DIR.exists():
        shm_bytes = shutil.disk_usage(SHM_DIR).free
        checks.append(shm_check(num_cpus, free_bytes=shm_bytes, memory_bytes=free_bytes))
    return checks


def memory_check(
    num_cpus: float, *, free_bytes: int, total_bytes: int, is_limited: bool = False
) -> Check:
    """Cores that this process may use, and memory; `is_limited`: that of its container."""
    is_enough = free_bytes >= MIN_MEMORY_BYTES
    whose, more = "", "end other programs"
    if is_limited:
        whose = "the container's "
        more = "allow the container more (docker run --memory, its pod's resources.limits.memory)"
    return Check(
        name="memory",
        verdict="ok" if is_enough else "wrong",
        found=f"{num_cpus:g} cores, {free_bytes / GIB:.1f} of {whose}{total_bytes / GIB:.1f} GiB "
        "free",
        mend=""
        if is_enough
        else f"{more}: a run of small models takes {MIN_MEMORY_BYTES / GIB:g} GiB",
    )


def disk_check(folder: str, *, free_bytes: int, total_bytes: int) -> Check:
    """Where Ray and plans keep what does not fit into memory."""
    is_short = free_bytes < MIN_DISK_BYTES
    is_full = total_bytes > 0 and free_bytes / total_bytes < 1 - MAX_DISK_SHARE
    found = f"{free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free in {folder}"
    if is_full and not is_short:
        found += f"; Ray keeps nothing on a disk that is {MAX_DISK_SHARE:.0%} full"
    return Check(
        name="disk",
        verdict="wrong" if is_short or is_full else "ok",
        found=found,
        mend="free space there, or name another folder: export TMPDIR=DIR RAY_TMPDIR=DIR"
        if is_short or is_full
        else "",
        is_needed=is_short,
    )


def shm_check(num_cpus: float, *, free_bytes: int, memory_bytes: int) -> Check:
    """Where Ray keeps what goes from process to process.

    Args:
        num_cpus: For which it is kept.
        free_bytes: Of its file system, whose size is not that of memory.
        memory_bytes: Free, which it takes up as it fills.
    """
    wanted = max(OBJECT_STORE_BYTES_PER_CPU * max(1, int(num_cpus)), MIN_OBJECT_STORE_BYTES)
    is_large = free_bytes >= MIN_OBJECT_STORE_BYTES
    is_enough = is_large and memory_bytes >= MIN_OBJECT_STORE_BYTES
    found = f"{free_bytes / GIB:.1f} GiB free in {SHM_DIR}"
    mend = ""
    if not is_large:
        found += ": Ray takes a disk instead, which is slower"
        size = -(-wanted // GIB)
        mend = (
            f"docker run --shm-size={size}g, an emptyDir of medium Memory there in a pod, or mount "
            f"-o remount,size={size}G {SHM_DIR}"
        )
    elif not is_enough:
        found += f", but {memory_bytes / GIB:.1f} GiB of memory to fill it with"
        mend = "see memory"
    return Check(
        name="shared memory", verdict="ok" if is_enough else "wrong", found=found, mend=mend
    )


def open_files_check(most_files: int) -> Check:
    """How many files and connections one process may have, at most."""
    is_unlimited = most_files == resource.RLIM_INFINITY
    is_enough = is_unlimited or most_files >= MIN_OPEN_FILES
    return Check(
        name="open files",
        verdict="ok" if is_enough else "wrong",
        found="no limit" if is_unlimited else f"at most {most_files:,} for a process",
        mend="" if is_enough else "ulimit -Hn 65536, as root, or docker run --ulimit nofile=65536",
    )
