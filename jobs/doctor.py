"""`clipmill doctor`: what this machine or cluster can run, and the command for what is missing.

Knows nothing of how a thing is looked at. Runs where packages are missing: that is found first.
"""

import sys
from collections.abc import Sequence

from jobs.checks.packages import missing_check, requirements
from jobs.checks.report import show


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 if `clipmill embed` would run here, else 1."""
    words = sys.argv[1:] if argv is None else list(argv)
    missing = missing_check(requirements())
    if missing is not None:
        return show([missing], as_json="--json" in words)
    # Only now: these bring the packages along.
    from jobs.checks.examination import examine
    from jobs.command import run

    run(examine, words)


if __name__ == "__main__":
    sys.exit(main())
