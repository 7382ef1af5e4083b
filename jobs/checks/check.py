"""One thing that was looked at: is it there and right, and what mends it.

Knows nothing of what is looked at. Imports nothing that may be missing.
"""

from dataclasses import dataclass
from typing import Literal

# `unseen`: it could not be looked at, which says nothing against it.
Verdict = Literal["ok", "missing", "wrong", "unseen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What was found of one thing; JSON-able."""

    name: str
    """Of the thing."""
    verdict: Verdict
    """What is to be thought of it."""
    found: str
    """What there is."""
    mend: str = ""
    """The command that mends it, or what to do; empty if nothing is to be done."""
    is_needed: bool = False
    """Whether `clipmill embed` does not run here if it is missing or wrong."""

    @property
    def stops(self) -> bool:
        """Whether `clipmill embed` does not run here because of it."""
        return self.is_needed and self.verdict in ("missing", "wrong")


def urgency(check: Check) -> int:
    """By which checks sort: what stops `clipmill embed` first, then what is not ok."""
    return 0 if check.stops else 1 if check.verdict != "ok" else 2
