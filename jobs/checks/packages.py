"""Checks Python and the installed packages against what the project asks for and was tested with.

Knows nothing of what the packages do. Imports nothing that may be missing before it is known.
"""

import importlib.metadata
import platform
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.checks.check import Check

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "clipmill"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
MAX_NAMED = 5

Installed = Callable[[str], str | None]


def wanted_python() -> str:
    """What the project asks of Python, as a version specifier."""
    if (ROOT / "pyproject.toml").exists():
        return str(_project()["requires-python"])
    return importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]


def requirements() -> list[str]:
    """What the project asks of packages, without extras: of the sources, or as it was installed."""
    if (ROOT / "pyproject.toml").exists():
        return list(_project()["dependencies"])
    wanted = importlib.metadata.requires(DISTRIBUTION) or []
    return [line for line in wanted if "extra ==" not in line]


def constrained_versions() -> dict[str, str]:
    """Package -> the version that the tests ran with; empty where the sources are not at hand."""
    path = ROOT / "constraints.txt"
    if not path.exists():
        return {}
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.partition("==") for line in lines if "==" in line)
    return {name: version for name, _, version in pairs}


def installed_version(name: str) -> str | None:
    """Of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_check(
    wanted: Sequence[str], *, installed: Installed = installed_version
) -> Check | None:
    """Which packages are not there at all; None if all are. Needs none of them."""
    missing = [line for line in wanted if installed(_name(line)) is None]
    if not missing:
        return None
    return Check(
        name="packages",
        verdict="missing",
        found=", ".join(map(_name, missing)),
        mend=_pip_install(missing),
        is_needed=True,
    )


def python_check(wanted: str, *, version: str | None = None) -> Check:
    """Whether this Python is one that the project runs under."""
    from packaging.specifiers import SpecifierSet

    version = version or platform.python_version()
    is_right = SpecifierSet(wanted).contains(version, prereleases=True)
    return Check(
        name="python",
        verdict="ok" if is_right else "wrong",
        found=f"{version} on {platform.machine()}" + ("" if is_right else f", {wanted} is needed"),
        mend="" if is_right else "python3.12 -m venv .venv, and install Clipmill there",
        is_needed=True,
    )


def packages_check(wanted: Sequence[str], *, installed: Installed = installed_version) -> Check:
    """Whether the packages, all of which are there, are of versions that the project allows."""
    from packaging.requirements import Requirement

    wrong, needs = [], []
    for line in wanted:
        requirement = Requirement(line)
        version = installed(requirement.name)
        if version is None or requirement.specifier.contains(version, prereleases=True):
            continue
        wrong.append(f"{requirement.name} {version}, {requirement.specifier} is needed")
        needs.append(line)
    if not wrong:
        return Check(
            name="packages",
            verdict="ok",
            found=f"all {len(wanted)} that pyproject.toml asks for",
            is_needed=True,
        )
    return Check(
        name="packages",
        verdict="wrong",
        found="; ".join(wrong),
        mend=_pip_install(needs),
        is_needed=True,
    )


def constraints_check(
    wanted: Sequence[str],
    tested: Mapping[str, str],
    *,
    installed: Installed = installed_version,
) -> Check:
    """Which packages are of other versions than the tests ran with: right, but nobody tried."""
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    by_name = {canonicalize_name(name): version for name, version in tested.items()}
    others, num_tested = [], 0
    for line in wanted:
        name = canonicalize_name(_name(line))
        version = installed(name)
        if name not in by_name or version is None:
            continue
        num_tested += 1
        # `2.13.0+cpu` is 2.13.0 of another build.
        if Version(version).public != Version(by_name[name]).public:
            others.append(f"{name} {version} ({by_name[name]})")
    if not others:
        return Check(
            name="tested versions",
            verdict="ok",
            found=f"{num_tested} packages as in constraints.txt"
            if tested
            else "no constraints.txt beside the sources",
        )
    more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
    return Check(
        name="tested versions",
        verdict="ok",
        found=f"{len(others)} of {num_tested} packages are not of the versions that the tests ran "
        f"with: {', '.join(others[:MAX_NAMED])}{more}",
        mend="pip install -c constraints.txt .",
    )


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _name(requirement: str) -> str:
    found = _NAME.match(requirement)
    assert found is not None  # every requirement begins with a name
    return found.group()


def _pip_install(wanted: Sequence[str]) -> str:
    constraints = ["-c", "constraints.txt"] if (ROOT / "constraints.txt").exists() else []
    return shlex.join(["pip", "install", *constraints, *wanted])
