"""Removes what no kept snapshot needs: manifests, then embeddings and rejects, then indexes.

Knows nothing of what the files hold, nor of reports of runs, which stay.

Kept are the last snapshots, and those that were current until a short while ago: a reader or a run
that began with one may still be at it. So is all that was written a short while ago, with all else
of its plan or index: a run adds to what it, or one that was killed before it, wrote hours ago.
All ages are by the clock of the store's file system, but where nothing is removed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import PurePosixPath
from typing import Literal, get_args

from engine.publishing.folders import ListedFile
from pipelines.errors import StoreError
from pipelines.indexes.manifest import MANIFEST_FILE, index_dir
from pipelines.runs.run_ids import RUNS_DIR
from pipelines.snapshots import (
    SNAPSHOTS_DIR,
    Snapshot,
    manifest_path,
    read_snapshot,
    snapshot_numbers,
)
from pipelines.store import Store

Place = Literal["snapshots", "embeddings", "rejects", "indexes"]

# What is written together: files of a plan under two folders, those of an index under one.
_GROUPED: tuple[tuple[Place, ...], ...] = (("embeddings", "rejects"), ("indexes",))


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What stays."""

    num_snapshots: int
    """So many last ones of the log; the current one is the first of them."""
    min_age_hours: float = 24.0
    """What was current or written since stays; longer than any reader or pause of a run."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_snapshots < 1:
            raise ValueError(f"num_snapshots={self.num_snapshots}: expected at least 1 (--keep)")
        if not self.min_age_hours >= 0:
            raise ValueError(f"min_age_hours={self.min_age_hours}: expected at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vacuumed:
    """What went, or would go."""

    snapshots: tuple[int, ...]
    """Their numbers, ascending."""
    num_files: dict[Place, int]
    """Folder of the store -> files from there."""
    num_bytes: dict[Place, int]
    """Folder of the store -> their size."""


def find_garbage(store: Store, retention: Retention) -> Vacuumed:
    """What a vacuum would remove, by this machine's clock. StoreError as for that.

    The file system's own is read from a file that is written, for which one may lack the rights.
    """
    return _counted(_garbage(store, retention, clock=partial(datetime.now, UTC)))


def vacuum(store: Store, retention: Retention) -> Vacuumed:
    """Remove what no kept snapshot needs; killed at any point, the next one goes on.

    Raises:
        StoreError: There is no snapshot, or the manifest of one cannot be read, or the file system
            does not tell ages, and nothing was removed; or something cannot be listed or removed.
    """
    return _counted(_removed(store, retention))


def _removed(store: Store, retention: Retention) -> Iterator[tuple[Place, list[ListedFile]]]:
    for place, files in _garbage(store, retention, clock=store.current_time):
        paths = [file.path for file in files]
        # The record first: nobody shall find half an index.
        records = [path for path in paths if path.endswith(f"/{MANIFEST_FILE}")]
        store.remove_files(records)
        store.remove_files(set(paths).difference(records))
        yield place, files


def _garbage(
    store: Store, retention: Retention, *, clock: Callable[[], datetime]
) -> Iterator[tuple[Place, list[ListedFile]]]:
    """What can go, in the order in which it must, each found right before it is handed out."""
    if not snapshot_numbers(store):
        # What looks like one may be a store that is being copied.
        raise StoreError(f"store {store.uri} has no snapshot, by which to tell what it needs")
    now = clock()

    def is_old(file: ListedFile) -> bool:
        return (now - file.modified_at) / timedelta(hours=1) >= retention.min_age_hours

    # Of those committed from here on there is no time: they are young.
    manifests = {file.path: file for file in store.files(SNAPSHOTS_DIR)}
    numbers = snapshot_numbers(store)
    needed: set[str] = set()
    doomed = []
    for number, successor in zip(numbers, [*numbers[1:], None], strict=True):
        # Also one that will go: what cannot be read may be of a Clipmill with other rules.
        snapshot = read_snapshot(store, number)
        manifest = manifests.get(snapshot.path)
        superseded = None if successor is None else manifests.get(manifest_path(successor))
        is_last = number in numbers[-retention.num_snapshots :]
        if is_last or manifest is None or superseded is None or not is_old(superseded):
            needed |= _needs(snapshot)
        else:
            doomed.append(manifest)
    for manifest in doomed:
        yield "snapshots", [manifest]
    # Beside manifests and reports, or as probes in the root; those of other folders go with these.
    runs = [f"{RUNS_DIR}/{run}" for run in store.names(RUNS_DIR)] if store.is_local else []
    for folder in ("", SNAPSHOTS_DIR, *runs):
        yield "snapshots", [file for file in store.hidden_files(folder) if is_old(file)]
    newest = numbers[-1]
    for places in _GROUPED:
        for name in sorted({name for place in places for name in store.names(place)}):
            files = {place: store.files(f"{place}/{name}") for place in places}
            if not all(is_old(file) for of_place in files.values() for file in of_place):
                continue
            # A rollback, or a run that found what a killed one left, may have come meanwhile.
            for number in snapshot_numbers(store):
                if number > newest:
                    needed |= _needs(read_snapshot(store, number))
                    newest = number
            for place, of_place in files.items():
                if f"{place}/{name}" not in needed:
                    yield place, [file for file in of_place if file.path not in needed]


def _needs(snapshot: Snapshot) -> set[str]:
    """Paths of its files, and the folders of its indexes."""
    indexes = {index_dir(snapshot, modality=modality) for modality in snapshot.modalities}
    return {file.path for file in snapshot.files} | indexes


def _counted(garbage: Iterable[tuple[Place, list[ListedFile]]]) -> Vacuumed:
    snapshots = []
    num_files: Counter[Place] = Counter()
    num_bytes: Counter[Place] = Counter()
    for place, files in garbage:
        num_files[place] += len(files)
        num_bytes[place] += sum(file.num_bytes for file in files)
        if place == "snapshots":
            names = [PurePosixPath(file.path).stem for file in files]
            snapshots += [int(name) for name in names if name.isdecimal()]
    return Vacuumed(
        snapshots=tuple(snapshots),
        num_files={place: num_files[place] for place in get_args(Place)},
        num_bytes={place: num_bytes[place] for place in get_args(Place)},
    )
