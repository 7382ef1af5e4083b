"""Decides which stored files are written anew as one: those with dead rows, and small ones.

Knows nothing of rows or of how files are written.

A file with fewer rows than half of what a run writes into one is *small*. Small files lie in tiers:
the rows of a tier are those of the tier below times FAN_IN. Once a tier has FAN_IN files, they are
merged, whereby each comes into a higher tier or is small no more. So a row is merged at most once
for each tier, however many nights there are, and what stays small is fewer than FAN_IN files of
each tier. Files are merged with those of their own kind and modality only.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipelines.snapshots import StoredFile

FAN_IN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What is, or will be, one file."""

    files: tuple[StoredFile, ...]
    """Whose live rows it holds."""
    num_rows: int
    """How many they are."""


def files_to_write(
    files: Iterable[StoredFile], *, num_live: Mapping[str, int], rows_per_file: int
) -> list[list[StoredFile]]:
    """The files that are to be written anew, each list as one; all others stay as they are.

    Args:
        files: All with live rows.
        num_live: Path -> live rows.
        rows_per_file: Of a merged file, at most, and of what a run writes.
    """
    by_group = defaultdict(list)
    for file in files:
        part = _Part(files=(file,), num_rows=num_live[file.path])
        by_group[file.kind, file.modality].append(part)
    return [
        list(part.files)
        for _, parts in sorted(by_group.items())
        for part in _compacted(parts, rows_per_file=rows_per_file)
        if len(part.files) > 1 or part.num_rows < part.files[0].num_rows
    ]


def num_tiers(rows_per_file: int) -> int:
    """How many tiers small files lie in."""
    return _tier(1, rows_per_file=rows_per_file) + 1 if rows_per_file > 2 else 0


def _compacted(parts: Sequence[_Part], *, rows_per_file: int) -> list[_Part]:
    tiers: dict[int, list[_Part]] = defaultdict(list)
    done = []

    def add(part: _Part) -> None:
        if 2 * part.num_rows < rows_per_file:
            tiers[_tier(part.num_rows, rows_per_file=rows_per_file)].append(part)
        else:
            done.append(part)

    for part in parts:
        add(part)
    # From the smallest rows up: what is merged may fill the tier that it comes to.
    for tier in reversed(range(num_tiers(rows_per_file))):
        members, tiers[tier] = tiers[tier], []
        if len(members) < FAN_IN:
            done += members
            continue
        for some in _packed(members, rows_per_file=rows_per_file):
            num_rows = sum(part.num_rows for part in some)
            if len(some) >= FAN_IN or 2 * num_rows >= rows_per_file:
                files = tuple(file for part in some for file in part.files)
                add(_Part(files=files, num_rows=num_rows))
            else:
                done += some
    return done


def _tier(num_rows: int, *, rows_per_file: int) -> int:
    """0 for the largest of small files: each is a FAN_IN-th of the one before, the last has one."""
    tier = 0
    while 2 * num_rows * FAN_IN ** (tier + 1) < rows_per_file:
        tier += 1
    return tier


def _packed(parts: Iterable[_Part], *, rows_per_file: int) -> Iterator[list[_Part]]:
    """As many together as a file may hold, the smallest first."""
    some: list[_Part] = []
    num_rows = 0
    for part in sorted(parts, key=lambda part: (part.num_rows, part.files[0].path)):
        if num_rows + part.num_rows > rows_per_file:
            yield some
            some, num_rows = [], 0
        some.append(part)
        num_rows += part.num_rows
    yield some
