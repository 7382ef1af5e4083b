"""Names of jobs: what a command works on, so that no two work on it at once, and how often it ran.

Knows nothing of servers.
"""

import hashlib
import json
import re
from collections.abc import Iterable

from jobs.submission.words import CommandWords
from pipelines.store_places import last_parts, store_digest

_MAX_PLACE_CHARACTERS = 24


def target_of(command: CommandWords) -> str:
    """A digest of what the command works on, hex: one job at a time may.

    That is the store, whatever the command and whatever the catalog. A command without one, of
    `engine`, has all its options.
    """
    store = command.value("store")
    if store:
        return store_digest(store)
    config = json.dumps(command.config, sort_keys=True, default=str)
    what = [command.command, *command.words, config]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def base_name(command: CommandWords) -> str:
    """What the ids of all runs on a command's target begin with.

    Of a store it is the same whatever the command: of two that are submitted at the same moment,
    the second finds the id taken.
    """
    store = command.value("store")
    named = store or command.value("checkpoint")
    place = last_parts(named, 1) if named else ""
    words = re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-")
    parts = ["clipmill", "" if store else command.command, words[:_MAX_PLACE_CHARACTERS].strip("-")]
    return "-".join([*filter(None, parts), target_of(command)[:8]])


def next_id(base: str, *, ids: Iterable[str]) -> str:
    """The id of the next run: a number more than the last one that the server knows."""
    pattern = re.compile(rf"{re.escape(base)}-(\d+)")
    numbers = [int(found[1]) for found in map(pattern.fullmatch, ids) if found]
    return f"{base}-{max(numbers, default=0) + 1}"
