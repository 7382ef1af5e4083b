"""What `clipmill doctor` prints, and its exit code.

Knows nothing of how a thing is looked at. Imports nothing that may be missing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from engine.redaction import redacted
from jobs.checks.check import Check, urgency

WIDTH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorReport:
    """What was found; JSON-able."""

    runs: bool
    """Whether `clipmill embed` would run."""
    checks: list[Check]
    """What stops it first, then what else is not ok."""


def show(checks: Sequence[Check], *, as_json: bool) -> int:
    """Print checks, the most urgent first; returns the exit code."""
    ordered = [
        replace(check, found=redacted(check.found), mend=check.mend and redacted(check.mend))
        for check in sorted(checks, key=urgency)
    ]
    report = DoctorReport(runs=not any(check.stops for check in ordered), checks=ordered)
    print(json.dumps(asdict(report)) if as_json else text(report))
    return 0 if report.runs else 1


def text(report: DoctorReport) -> str:
    """The report for a terminal."""
    width = max([WIDTH, *(len(check.name) for check in report.checks)])
    lines = []
    for check in report.checks:
        lines.append(f"{check.verdict:<8} {check.name:<{width}} {check.found}")
        lines += [f"{'':<8} {'':<{width}} -> {check.mend}"] if check.mend else []
    stopping = [check.name for check in report.checks if check.stops]
    if not report.runs:
        verdict = f"`clipmill embed` would not run here: {', '.join(stopping)}"
    elif unseen := [check.name for check in report.checks if check.verdict == "unseen"]:
        verdict = (
            "`clipmill embed` would run here, as far as could be seen; not looked at: "
            f"{', '.join(unseen)}"
        )
    else:
        verdict = "`clipmill embed` would run here"
    return "\n".join([*lines, verdict])
