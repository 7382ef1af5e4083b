"""The `clipmill` command: picks the command by its first word.

Knows nothing of the commands but their names.
"""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": ("jobs.demo.run", "offline, from nothing to a report with pictures"),
    "engine": ("jobs.engine", "build engines, judge them, promote them or go back"),
    "embed": ("jobs.embed", "embed what is new or changed in a catalog"),
    "nightly": ("jobs.nightly", "embed, ask the guards, index, commit: the one to schedule"),
    "snapshots": (
        "jobs.snapshots",
        "the states of a store: what changed, going back, removing old ones",
    ),
    "runs": ("jobs.runs", "what the runs of a store did, and how fast"),
    "index": ("jobs.index", "build the index of the current snapshot"),
    "query": ("jobs.query", "find the nearest rows to a text or an image"),
    "serve": ("jobs.serve", "an HTTP API and a page that searches"),
    "submit": ("jobs.submit", "run one of these as a job on a Ray cluster, and follow it"),
    "jobs": ("jobs.submitted", "what was submitted: find it again, follow it, stop it"),
    "doctor": ("jobs.doctor", "what this machine or cluster can run, and what mends it"),
    "bench": ("jobs.bench", "measure encoders, the pipeline, the answers of a store"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to the named command; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] not in COMMANDS:
        print(f"clipmill: no command {words[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    # Imported only now: each command brings its own heavy libraries.
    command = importlib.import_module(COMMANDS[words[0]][0])
    if words[0] == "doctor":  # which runs where packages are missing
        return int(command.main(words[1:]))
    from jobs.command import run

    run(command.main, words[1:])


def _usage() -> str:
    lines = [f"  {name:<9} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: clipmill COMMAND [options]   (clipmill COMMAND --help)", "", *lines])


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
