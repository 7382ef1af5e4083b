"""Names of jobs: what a command works on, so that no two work on it at once, and how often it ran.

Knows nothing of servers.
"""

import hashlib
import json
import re
from collections.abc import Iterable

from engine.redaction import MASK, public_uri
from jobs.submission.words import CommandWords

_MAX_PLACE_CHARACTERS = 24


def target_of(command: CommandWords) -> str:
    """A digest of what the command works on, hex: one job at a time may.

    That is the store, whatever the command and whatever the catalog. A command without one, of
    `engine`, has all its options.
    """
    store = command.value("store")
    # A signature is another one every day.
    place = public_uri(store or "").rstrip("/")
    config = json.dumps(command.config, sort_keys=True, default=str)
    what = ["store", place] if store else [command.command, *command.words, config]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def base_name(command: CommandWords) -> str:
    """What the ids of all runs of a command on its target begin with."""
    place = command.value("store") or command.value("checkpoint") or ""
    place = public_uri(place).removesuffix(f"?{MASK}").rstrip("/")
    last = re.sub(r"[^a-z0-9]+", "-", place.rsplit("/", 1)[-1].lower()).strip("-")
    parts = ["clipmill", command.command, last[:_MAX_PLACE_CHARACTERS].strip("-")]
    return "-".join([*filter(None, parts), target_of(command)[:8]])


def next_id(base: str, *, ids: Iterable[str]) -> str:
    """The id of the next run: a number more than the last one that the server knows."""
    pattern = re.compile(rf"{re.escape(base)}-(\d+)")
    numbers = [int(found[1]) for found in map(pattern.fullmatch, ids) if found]
    return f"{base}-{max(numbers, default=0) + 1}"
