"""What made a snapshot: plan, code, command line, and what its guards measured.

Knows nothing of how a guard measures or of what is in the snapshot.
"""

import importlib.metadata
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pipelines.counts import KeyCounts
from pipelines.manifests import from_record
from pipelines.schema import Modality

GuardName = Literal[
    "rejects", "deletions", "norms", "drift", "new_drift", "collapse", "neighbours", "recall"
]
GUARDS: tuple[GuardName, ...] = get_args(GuardName)

# Of the others the bound is the least that is allowed.
_AT_MOST: tuple[GuardName, ...] = ("rejects", "deletions", "norms", "collapse")

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one guard saw."""

    guard: GuardName
    """Which."""
    modality: Modality | None
    """Of what; None: of keys, whatever they have."""
    value: float
    """Measured."""
    bound: float
    """The most or the least that it may be."""
    is_tripped: bool
    """Whether it is beyond."""
    detail: str
    """What was counted or sampled, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """How a snapshot came about, besides its engine, its catalog and its parent."""

    plan: Mapping[Modality, KeyCounts]
    """What was to be done for the keys."""
    code_version: str
    """Of Clipmill."""
    command: tuple[str, ...] = ()
    """The command line, without what may be secret; empty for a run from Python."""
    accepted: tuple[GuardName, ...] = ()
    """Guards that tripped and were let pass by name."""
    measurements: tuple[Measurement, ...] = field(default=())
    """Of the guards; none where none were asked."""


def measurement_line(measurement: Measurement) -> str:
    """One measurement in one line."""
    what = (
        measurement.guard
        if measurement.modality is None
        else (f"{measurement.guard} of {measurement.modality}")
    )
    side = "most" if measurement.guard in _AT_MOST else "least"
    return (
        f"{what}: {measurement.value:.4f}, at {side} {measurement.bound:g} is allowed "
        f"({measurement.detail})"
    )


def lineage_from(record: Mapping[str, Any]) -> Lineage:
    """Read it back from JSON; errors as of `from_record`, and KeyError."""
    measurements = record["measurements"]
    return from_record(
        Lineage,
        {
            **record,
            "plan": {name: from_record(KeyCounts, keys) for name, keys in record["plan"].items()},
            "command": tuple(record["command"]),
            "accepted": tuple(record["accepted"]),
            "measurements": tuple(from_record(Measurement, entry) for entry in measurements),
        },
    )


def code_version() -> str:
    """Clipmill's version: that of the sources where they run as they are, or as installed."""
    if PYPROJECT.exists():
        version: str = tomllib.loads(PYPROJECT.read_text())["project"]["version"]
        return version
    return importlib.metadata.version("clipmill")
