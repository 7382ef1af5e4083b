"""All checks of one machine, of a cluster or alone.

Knows nothing of the cluster. Runs in Ray's workers, too.
"""

from jobs.checks.check import Check
from jobs.checks.gpu import gpu_checks
from jobs.checks.machine import machine_checks
from jobs.checks.packages import (
    constrained_versions,
    constraints_check,
    packages_check,
    python_check,
    requirements,
    wanted_python,
)


def package_checks() -> list[Check]:
    """Python and its packages."""
    wanted = requirements()
    return [
        python_check(wanted_python()),
        packages_check(wanted),
        constraints_check(wanted, constrained_versions()),
    ]


def cpu_checks() -> list[Check]:
    """All of this machine but its GPUs."""
    return [*package_checks(), *machine_checks()]


def node_checks() -> list[Check]:
    """All of this machine."""
    return [*cpu_checks(), *gpu_checks()]
