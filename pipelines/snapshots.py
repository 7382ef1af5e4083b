"""The store's log of snapshots: numbered manifests, each one complete state, committed whole.

Knows nothing of how rows are embedded or which of them changed.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from engine.backends.choice import Backend
from pipelines.errors import StoreError
from pipelines.lineage import Lineage, lineage_from
from pipelines.manifests import from_record, read_manifest
from pipelines.schema import Decoder, EmbeddingDtype, Modality
from pipelines.store import Store

FORMAT_VERSION = 1
SNAPSHOTS_DIR = "snapshots"

Kind = Literal["embeddings", "rejects"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One Parquet file of the store."""

    path: str
    """Relative to the store's root."""
    kind: Kind
    """What its rows are."""
    modality: Modality | None
    """Of all its rows; None for rejects of whole rows (null and duplicate keys)."""
    num_rows: int
    """Rows."""
    num_bytes: int
    """Size."""


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Which engine made the embeddings, and how to get it again."""

    engine_id: str
    """Same id, same embeddings."""
    checkpoint: str
    """Hub id or folder it is built from."""
    revision: str | None
    """Hub commit, None for a folder."""
    weights: str | None = None
    """`Manifest.weights`: which build of an fp8 engine it is."""


@dataclass(frozen=True, kw_only=True)
class CatalogRecord:
    """Which catalog the rows came from."""

    uri: str
    """As given."""
    num_rows: int
    """Rows, those with null and duplicate keys included."""
    num_keys: int
    """Distinct keys: each is in embeddings or in rejects once, for each modality."""
    columns: Mapping[str, str | None]
    """Role (key, image, text, version, carry) -> column, or columns joined by commas."""
    files: Mapping[str, str]
    """Path -> identity of its content."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One immutable, complete state of the embeddings."""

    number: int
    """Counts from 1."""
    parent: int | None
    """The snapshot that this one was made from."""
    created_at: str
    """UTC, ISO 8601; for people: order is by number."""
    run_id: str
    """The run that committed it; of a rollback, the one that committed what it restores."""
    engine: EngineRecord
    """Of every row."""
    catalog: CatalogRecord
    """What it is a state of."""
    key_type: str
    """string or int64."""
    embedding_dim: int
    """D."""
    embedding_dtype: EmbeddingDtype
    """Of the elements."""
    modalities: tuple[Modality, ...]
    """What each key has an embedding or a reject of."""
    files: tuple[StoredFile, ...]
    """All files; what is in no snapshot does not exist for a reader."""
    backend: Backend = "onnxruntime"
    """What executed the engine in the run that committed it."""
    decoder: Decoder = "cpu"
    """Where that run decoded JPEGs."""
    restores: int | None = None
    """The earlier snapshot that this one, a rollback, is the same as."""
    lineage: Lineage | None = None
    """How it came about; of a rollback, how what it restores did. None in old manifests."""

    @property
    def path(self) -> str:
        """Of the manifest, relative to the store's root."""
        return manifest_path(self.number)

    def files_of(self, kind: Kind, *, modality: Modality | None = None) -> list[StoredFile]:
        """The files of one kind, and of one modality if it is given."""
        return [
            file
            for file in self.files
            if file.kind == kind and (modality is None or file.modality == modality)
        ]

    def num_rows(self, kind: Kind, *, modality: Modality | None = None) -> int:
        """Rows of one kind, and of one modality if it is given."""
        return sum(file.num_rows for file in self.files_of(kind, modality=modality))


def is_other_engine(engine: EngineRecord, parent: Snapshot) -> bool:
    """Whether an engine, or its build, is not the one of a snapshot's rows."""
    return (engine.engine_id, engine.weights) != (parent.engine.engine_id, parent.engine.weights)


def manifest_path(number: int) -> str:
    """Of a snapshot's manifest, relative to the store's root."""
    return f"{SNAPSHOTS_DIR}/{number:08d}.json"


def current_snapshot(store: Store) -> Snapshot | None:
    """The snapshot with the highest number, None in an empty store.

    Raises:
        StoreError: Its manifest cannot be read, is damaged, or is of a newer format.
    """
    return read_snapshot(store, None) if snapshot_numbers(store) else None


def snapshot_numbers(store: Store) -> list[int]:
    """All snapshots, ascending; the last is the current one. Those vacuumed are no more."""
    paths = store.list(SNAPSHOTS_DIR, suffix=".json")
    names = [path.rsplit("/", 1)[-1].removesuffix(".json") for path in paths]
    return sorted(int(name) for name in names if name.isdecimal())


def read_snapshot(store: Store, number: int | None) -> Snapshot:
    """One snapshot by its number, or the current one.

    Raises:
        StoreError: There is none, or its manifest cannot be read, is damaged, or is of a newer
            format.
    """
    numbers = snapshot_numbers(store)
    if not numbers:
        raise StoreError(f"store {store.uri} has no snapshot; run `clipmill embed` first")
    if number is not None and number not in numbers:
        was_there = 0 < number < numbers[-1]
        why = ": it was vacuumed, or its manifest moved away. There are " if was_there else ", but "
        raise StoreError(
            f"store {store.uri} has no snapshot {number}{why}{numbers_in_words(numbers)}"
        )
    wanted = numbers[-1] if number is None else number
    return _read(store, wanted, is_newest=wanted == numbers[-1])


def read_log(store: Store) -> Iterator[tuple[int, Snapshot | StoreError]]:
    """All snapshots by their numbers, ascending; for one that cannot be read, why not.

    Raises:
        StoreError: The store cannot be listed.
    """
    numbers = snapshot_numbers(store)
    for number in numbers:
        try:
            yield number, _read(store, number, is_newest=number == numbers[-1])
        except StoreError as error:
            yield number, error


def numbers_in_words(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `1, 4 to 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)


def commit(store: Store, snapshot: Snapshot) -> None:
    """Make a snapshot the current one; CommitConflictError if another run took its number."""
    record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(snapshot)}
    store.create(snapshot.path, (json.dumps(record, indent=1) + "\n").encode())


def rollback(store: Store, number: int) -> Snapshot:
    """Commit a snapshot that lists the files of an earlier one; none of them is read or copied.

    The log only grows: what was current before stays in it, and can be returned to.

    Args:
        store: Whose snapshots they are.
        number: The earlier one, which may be a rollback itself.

    Returns:
        The new snapshot.

    Raises:
        CommitConflictError: Another run committed a snapshot meanwhile.
        StoreError: There is no such snapshot (any more), it is what is current already, or files
            of it are gone; or the store cannot be read or written.
    """
    current, earlier = read_snapshot(store, None), read_snapshot(store, number)
    if set(earlier.files) == set(current.files):
        what = "is" if number == current.number else "has the very files of"
        raise StoreError(
            f"store {store.uri}: snapshot {number} {what} the current one, {current.number}; "
            "there is nothing to roll back"
        )
    missing = missing_files(store, earlier.files)
    if missing:
        raise StoreError(
            f"store {store.uri}: {len(missing):,} files of snapshot {number} are gone, "
            f"{missing[0]} is one; put back a copy of them, or roll back to another"
        )
    restored = dataclasses.replace(
        earlier,
        number=current.number + 1,
        parent=current.number,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        restores=number,
    )
    commit(store, restored)
    if number not in snapshot_numbers(store):
        # A vacuum that removed it may have done so before it could see what was just committed.
        store.remove(restored.path)
        raise StoreError(
            f"store {store.uri}: snapshot {number} was vacuumed at this very moment; roll back to "
            "another"
        )
    return restored


def missing_files(store: Store, files: Iterable[StoredFile]) -> list[str]:
    """Paths of files that are not in the store, sorted; each folder is listed once."""
    paths = {file.path for file in files}
    folders = {path.rpartition("/")[0] for path in paths}
    return sorted(paths.difference(*(store.list(folder, suffix="") for folder in folders)))


def _read(store: Store, number: int, *, is_newest: bool) -> Snapshot:
    return read_manifest(
        store,
        manifest_path(number),
        format_version=FORMAT_VERSION,
        build=_snapshot_from,
        way_out="move it away, and the snapshot before it is current again"
        if is_newest
        else "move it away: no other snapshot needs it",
    )


def _snapshot_from(record: Mapping[str, Any]) -> Snapshot:
    lineage = record.get("lineage")
    return from_record(
        Snapshot,
        {
            **record,
            "engine": from_record(EngineRecord, record["engine"]),
            "catalog": from_record(CatalogRecord, record["catalog"]),
            "modalities": tuple(record["modalities"]),
            "files": tuple(from_record(StoredFile, file) for file in record["files"]),
            "lineage": lineage_from(lineage) if lineage else None,
        },
    )
