"""Kills nights with -9 at random moments, on three nodes of this machine, and compares the results.

    PYTHONPATH=. python3 tests/kills_check.py --kills 50 --seed 0

Drivers, workers and raylets in turn; each night is then run again until it is done. Prints a line
for each kill, and a table. With --late they are killed while they index, commit and report.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.kills import KINDS, OPTIONS, Killed, killed_nights


def table_of(kills: Sequence[Killed]) -> str:
    """What came of the kills, by kind."""
    lines = [
        "| killed | kills | runs needed at most | runs that died by themselves "
        "| rows redone: median, max |",
        "|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        chosen = [killed for killed in kills if kind in (killed.kind, "all")]
        if chosen:
            redone = [killed.num_redone for killed in chosen]
            lines.append(
                f"| {kind} | {len(chosen)} | {max(len(killed.codes) for killed in chosen)} "
                f"| {sum(bool(killed.said) for killed in chosen)} "
                f"| {statistics.median(redone):g}, {max(redone)} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Kill, compare, print; returns the number of nights that came out otherwise, at most 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--late", action="store_true", help="while indexing or afterwards")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    kills: list[Killed] = []
    faults = 0
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as scratch,
        killed_nights(Path(scratch), num_rows=options.rows) as nights,
    ):
        for name in OPTIONS:
            say(
                f"undisturbed, {name}: {nights.seconds[name]:.1f} s, "
                f"{nights.num_due[name]} rows to encode"
            )
        # Workers are gone by then.
        kinds = [kind for kind in KINDS if not (options.late and kind == "worker")]
        turns = itertools.cycle(itertools.product(OPTIONS, kinds))
        for number, (name, kind) in enumerate(itertools.islice(turns, options.kills), 1):
            share = float(rng.uniform())
            try:
                killed = nights.kill(kind, name=name, share=share, rng=rng, is_late=options.late)
            except Exception:
                faults += 1
                say(f"{number:>3} {name} {kind} at {share:.3f} FAILED\n{traceback.format_exc()}")
                continue
            kills.append(killed)
            say(
                f"{number:>3} {name:<8} {killed.share:.3f} {killed.victim:<40} {killed.where:<20} "
                f"codes {killed.codes} redone {killed.num_redone} {killed.said[:200]}"
            )
    say(table_of(kills))
    say(f"by then: {dict(Counter(killed.where for killed in kills))}")
    say(
        f"{len(kills)} nights equal to an undisturbed one, {faults} not; "
        f"{time.monotonic() - started:.0f} s"
    )
    return min(1, faults)


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
