"""Tests of jobs/checks/limits.py: files as Linux writes them in containers, pods and services."""

from pathlib import Path

import psutil
import pytest

from jobs.checks.limits import MemoryLimit, cpu_limit, memory_limit
from jobs.checks.machine import machine_checks

GIB = 2**30
V2 = "31 23 0:28 {root} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate"
V1_MEMORY = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V1_CPU = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
ELSEWHERE = "37 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"


def machine(root: Path, *, groups: list[str], mounts: list[str], files: dict[str, str]) -> Path:
    """A file system with these groups of a process, mounts, and files below `sys/fs/cgroup`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in groups))
    (root / "proc/self/mountinfo").write_text("".join(f"{line}\n" for line in mounts))
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def v2_memory(limit: int | str, used: int, *, of_files: int = 0, folder: str = "") -> dict:
    stat = f"anon 1\ninactive_file {of_files // 2}\nactive_file {of_files // 2}\nshmem 7"
    return {
        f"{folder}memory.max": str(limit),
        f"{folder}memory.current": str(used),
        f"{folder}memory.stat": stat,
    }


def v1_memory(limit: int, used: int, *, folder: str = "") -> dict:
    # Those of the group alone come first, and count for less than what is below it as well.
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0"
    return {
        f"memory/{folder}memory.limit_in_bytes": str(limit),
        f"memory/{folder}memory.usage_in_bytes": str(used),
        f"memory/{folder}memory.stat": stat,
    }


def test_a_container_of_version_2(tmp_path: Path):
    files = {**v2_memory(4 * GIB, 3 * GIB, of_files=GIB), "cpu.max": "150000 100000"}
    root = machine(tmp_path, groups=["0::/"], mounts=[V2.format(root="/")], files=files)
    assert memory_limit(root) == MemoryLimit(limit_bytes=4 * GIB, used_bytes=2 * GIB)
    assert cpu_limit(root) == 1.5


def test_what_is_above_a_group_bounds_it(tmp_path: Path):
    files = {
        **v2_memory("max", GIB, folder="pods.slice/pod/"),
        **v2_memory(8 * GIB, 7 * GIB, folder="pods.slice/"),
        "pods.slice/pod/cpu.max": "400000 100000",
        "pods.slice/cpu.max": "200000 100000",
    }
    mounts, groups = [V2.format(root="/")], ["0::/pods.slice/pod"]
    root = machine(tmp_path, groups=groups, mounts=mounts, files=files)
    assert memory_limit(root) == MemoryLimit(limit_bytes=8 * GIB, used_bytes=7 * GIB)
    assert cpu_limit(root) == 2


@pytest.mark.parametrize("mounted", ["/docker/0123", "/"])
def test_a_container_of_version_1(tmp_path: Path, mounted: str):
    # Docker mounts the group alone, and the process's path is the host's.
    folder = "" if mounted != "/" else "docker/0123/"
    files = {
        **v1_memory(2 * GIB, 2 * GIB, folder=folder),
        f"cpu,cpuacct/{folder}cpu.cfs_quota_us": "50000",
        f"cpu,cpuacct/{folder}cpu.cfs_period_us": "100000",
    }
    root = machine(
        tmp_path,
        groups=["5:memory:/docker/0123", "3:cpu,cpuacct:/docker/0123", "2:cpuset:/", "0::/"],
        mounts=[ELSEWHERE, *(line.format(root=mounted) for line in (V1_MEMORY, V1_CPU))],
        files=files,
    )
    assert memory_limit(root) == MemoryLimit(limit_bytes=2 * GIB, used_bytes=GIB)
    assert cpu_limit(root) == 0.5


def test_no_limit_is_none(tmp_path: Path):
    files = {**v2_memory("max", GIB), "cpu.max": "max 100000"}
    of_v2 = machine(tmp_path / "2", groups=["0::/"], mounts=[V2.format(root="/")], files=files)
    files = {
        **v1_memory(9_223_372_036_854_771_712, GIB),
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    mounts = [line.format(root="/") for line in (V1_MEMORY, V1_CPU)]
    groups = ["5:memory:/", "3:cpu,cpuacct:/"]
    of_v1 = machine(tmp_path / "1", groups=groups, mounts=mounts, files=files)
    root_of_v2 = machine(
        tmp_path / "0", groups=["0::/"], mounts=[V2.format(root="/")], files={"cgroup.procs": "1"}
    )
    for root in (of_v2, of_v1, root_of_v2, tmp_path / "nothing"):
        assert (memory_limit(root), cpu_limit(root)) == (None, None)


def test_a_machine_is_judged_by_what_the_container_may_take(tmp_path: Path):
    files = {**v2_memory(GIB, 3 * GIB // 4), "cpu.max": "50000 100000"}
    root = machine(tmp_path, groups=["0::/"], mounts=[V2.format(root="/")], files=files)
    checks = {check.name: check for check in machine_checks(root=root)}
    assert checks["memory"].verdict == "wrong"
    assert checks["memory"].found == "0.5 cores, 0.2 of the container's 1.0 GiB free"
    assert "docker run --memory" in checks["memory"].mend
    assert checks["shared memory"].verdict == "wrong"
    unlimited = machine(
        tmp_path / "host",
        groups=["0::/"],
        mounts=[V2.format(root="/")],
        files=v2_memory(psutil.virtual_memory().total + GIB, 0),
    )
    memory = machine_checks(root=unlimited)[0]
    assert "container" not in memory.found
