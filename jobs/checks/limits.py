"""Reads what a container may take of memory and cores: Linux's control groups, versions 1 and 2.

Knows nothing of what is enough. What a group may take is bound by those above it as well.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

_T = TypeVar("_T")
# Version 1 writes a number near 2^63 for no limit; no machine has an exbibyte.
_NO_LIMIT = 2**60


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimit:
    """Of the group with the least left."""

    limit_bytes: int
    """Beyond it the kernel kills a process of the group."""
    used_bytes: int
    """Of that, as Ray's monitor counts: without pages of files, which the kernel can give back."""

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return max(0, self.limit_bytes - self.used_bytes)


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """What this process's groups allow of memory; None if there is no limit.

    Args:
        root: Of the file system that holds `proc` and `sys`.
    """
    limits = [limit for group in _groups(root, "memory") if (limit := _read(_memory, group))]
    return min(limits, key=lambda limit: limit.free_bytes, default=None)


def cpu_limit(root: Path = Path("/")) -> float | None:
    """How many cores this process's groups allow, in shares; None if there is no limit.

    That is time: which cores a process may use, its affinity says.
    """
    shares = [share for group in _groups(root, "cpu") if (share := _read(_cpus, group))]
    return min(shares, default=None)


def _memory(group: Path) -> MemoryLimit | None:
    is_v2 = (group / "memory.max").exists()
    said = (group / ("memory.max" if is_v2 else "memory.limit_in_bytes")).read_text().strip()
    if said == "max" or int(said) >= _NO_LIMIT:
        return None
    used = int((group / ("memory.current" if is_v2 else "memory.usage_in_bytes")).read_text())
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    of_files = [name if is_v2 else f"total_{name}" for name in ("inactive_file", "active_file")]
    given_back = sum(int(stat[name]) for name in of_files)
    return MemoryLimit(limit_bytes=int(said), used_bytes=max(0, used - given_back))


def _cpus(group: Path) -> float | None:
    if (group / "cpu.max").exists():
        quota, period = (group / "cpu.max").read_text().split()
    else:
        quota = (group / "cpu.cfs_quota_us").read_text().strip()
        period = (group / "cpu.cfs_period_us").read_text()
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _read(read: Callable[[Path], _T | None], group: Path) -> _T | None:
    """Nothing of a group that has no such files (the root's of version 2) or may not be read."""
    try:
        return read(group)
    except (OSError, ValueError, KeyError):
        return None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of those above it, as far as they can be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    found = [line.split(":", 2) for line in lines]
    of_v1 = [path for _, names, path in found if controller in names.split(",")]
    of_v2 = [path for number, names, path in found if number == "0" and not names]
    for path in (of_v1 or of_v2)[:1]:
        yield from _folders(root, path, mounts=mounts, controller=controller if of_v1 else None)


def _folders(root: Path, path: str, *, mounts: list[str], controller: str | None) -> Iterator[Path]:
    """Those of a group's path; `controller` is that of a hierarchy of version 1."""
    for line in mounts:
        fields, _, kind = line.partition(" - ")
        kind_words = kind.split()
        if controller is None:
            is_it = kind_words[0] == "cgroup2"
        else:
            is_it = kind_words[0] == "cgroup" and controller in kind_words[-1].split(",")
        if not is_it:
            continue
        mounted, mount_point = fields.split()[3:5]
        top = root / mount_point.lstrip("/")
        folder = top
        # In a container the path may be the host's, and the mount begin at the container's group.
        if PurePosixPath(path).is_relative_to(mounted):
            folder = top / PurePosixPath(path).relative_to(mounted)
        if not folder.is_dir():
            folder = top
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder
        return
