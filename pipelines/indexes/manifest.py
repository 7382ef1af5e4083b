"""What an index is, where it lies, and whether it is there.

Knows nothing of FAISS. An index is named for what it holds, so that snapshots of the same
embeddings share one; each build of it has a folder of its own, and the manifest, which is
replaced in one step, says which of them serves.

    indexes/00112233445566778899aabbccddeeff/
      manifest.json        written last
      0011223344556677/    one build: the files that the manifest lists
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pipelines.errors import IndexMissingError
from pipelines.fingerprints import index_id
from pipelines.indexes.choice import MIN_PQ_ROWS, Kind, named_recipe
from pipelines.manifests import from_record, read_manifest
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot, StoredFile, read_snapshot
from pipelines.store import Store

# Format 1 was an exact index alone, without ids that stay: it is built anew.
FORMAT_VERSION = 2
INDEXES_DIR = "indexes"
MANIFEST_FILE = "manifest.json"
# Of files and folders: none leads out of its folder.
_NAME = re.compile(r"[0-9a-z]+(\.[a-z]+)?")
WAY_OUT = "remove the folder it is in and run `clipmill index` again"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of an index."""

    num_bytes: int
    """Size."""
    xxh3_128: str
    """Of its content: FAISS itself loads vectors with a flipped bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRecall:
    """What queries of one kind found at one setting."""

    kind: str
    """Of queries: image or text."""
    setting: int
    """Lists that are searched, or the length of a graph's queue; 0: an exact search has none."""
    num_queries: int
    """Asked; of many, every tenth for a hundred answers."""
    recall: Mapping[str, float]
    """k (1, 10, 100) -> share of the exact k nearest that are among the k found."""
    search_seconds: float
    """Median of a search for ten, one query at a time on one thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexManifest:
    """One index, complete."""

    index_id: str
    """Names its folder: a hash of modality, engine and the files of embeddings in it."""
    build_id: str
    """Names the folder within, with its files."""
    engine_id: str
    """Queries must be encoded by the same engine."""
    modality: Modality
    """Of the embeddings."""
    num_rows: int
    """Vectors and keys."""
    num_ids: int
    """Ids are below this; those of no row are free."""
    embedding_dim: int
    """D."""
    kind: Kind
    """How it is searched."""
    factory: str
    """FAISS's name of the index type."""
    reason: str
    """Why this type, and whether it was built or made from another."""
    memory_bytes: int
    """What a search wants in memory."""
    setting: int
    """Of searches: the least that reached the recall asked for, or the most that was tried."""
    min_recall: float
    """recall@10 that was asked for."""
    measured: tuple[MeasuredRecall, ...]
    """Of all settings tried, ascending."""
    num_trained_rows: int
    """Rows when it was trained; an update does not train."""
    num_changed_rows: int
    """That came, went or changed since."""
    asked: str = ""
    """A hash of the texts that recall was measured with, where they were given."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """Name -> what was written."""

    def recall_at(self, k: int) -> dict[str, float]:
        """Kind of queries -> recall@k at the setting of searches; empty if none were asked."""
        return {
            entry.kind: entry.recall[str(k)]
            for entry in self.measured
            if entry.setting == self.setting
        }

    @property
    def folder(self) -> str:
        """Where its files lie, relative to the store's root."""
        return f"{INDEXES_DIR}/{self.index_id}/{self.build_id}"


def index_dir(snapshot: Snapshot, *, modality: Modality) -> str:
    """Where an index lies, relative to the store's root."""
    return f"{INDEXES_DIR}/{index_id_of(snapshot, modality=modality)}"


def index_id_of(snapshot: Snapshot, *, modality: Modality) -> str:
    """The name of an index."""
    # Paths stand for contents: each file is written once, under a name drawn for it.
    paths = [file.path for file in indexed_files(snapshot, modality=modality)]
    return index_id([modality, snapshot.engine.engine_id, *paths])


def indexed_files(snapshot: Snapshot, *, modality: Modality) -> list[StoredFile]:
    """Files of embeddings in one order, so that all who build an index write the same bytes."""
    files = snapshot.files_of("embeddings", modality=modality)
    return sorted(files, key=lambda file: file.path)


def find_index(store: Store, snapshot: Snapshot, *, modality: Modality) -> IndexManifest | None:
    """The index of a snapshot's modality, None if it is not (wholly) built."""
    path = f"{index_dir(snapshot, modality=modality)}/{MANIFEST_FILE}"
    if path not in store.list(index_dir(snapshot, modality=modality), suffix=MANIFEST_FILE):
        return None
    return read_manifest(
        store, path, format_version=FORMAT_VERSION, build=_manifest_from, way_out=WAY_OUT
    )


def publish_index(store: Store, manifest: IndexManifest) -> None:
    """Make an index the one that serves, in one step; its files are there. StoreError."""
    record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    path = f"{INDEXES_DIR}/{manifest.index_id}/{MANIFEST_FILE}"
    store.publish(path, (json.dumps(record, indent=2) + "\n").encode())


def remove_other_builds(store: Store, manifest: IndexManifest) -> None:
    """Remove what lies beside an index that was published: builds before it; StoreError."""
    folder = f"{INDEXES_DIR}/{manifest.index_id}"
    for name in store.names(folder):
        if name not in (MANIFEST_FILE, manifest.build_id):
            store.remove(f"{folder}/{name}")


def missing_indexes(store: Store, snapshot: Snapshot) -> list[Modality]:
    """Modalities of a snapshot that have no index, or a damaged one; StoreError."""
    missing = []
    for modality in snapshot.modalities:
        manifest = find_index(store, snapshot, modality=modality)
        if manifest is None or damaged_file(store, manifest) is not None:
            missing.append(modality)
    return missing


def damaged_file(store: Store, manifest: IndexManifest) -> str | None:
    """A file of an index that is missing or of another size, None if all are whole; StoreError.

    Contents are not looked at before an index is opened.
    """
    for name, record in manifest.files.items():
        if store.file_bytes(f"{manifest.folder}/{name}") != record.num_bytes:
            return name
    return None


def check_rollback(store: Store, number: int) -> None:
    """See that readers who can query the current snapshot can query an earlier one as well.

    Raises:
        IndexMissingError: They cannot: it lacks an index.
        StoreError: There is no such snapshot, or the store cannot be read.
    """
    current, earlier = read_snapshot(store, None), read_snapshot(store, number)
    missing = missing_indexes(store, earlier)
    if missing and not missing_indexes(store, current):
        raise IndexMissingError(
            f"store {store.uri}: snapshot {number} has no index of {' and '.join(missing)} "
            f"embeddings, the current one has; run `clipmill index --store {store.uri} --snapshot "
            f"{number}` first. Nothing was changed"
        )


def _manifest_from(record: Mapping[str, Any]) -> IndexManifest | None:
    if "build_id" not in record:
        return None  # of format 1
    names = [record["index_id"], record["build_id"], *record["files"]]
    if not all(_NAME.fullmatch(name) for name in names) or record["kind"] not in get_args(Kind):
        raise ValueError(f"kind {record['kind']!r}, names {names}")
    named_recipe(record["factory"], num_rows=MIN_PQ_ROWS, embedding_dim=record["embedding_dim"])
    return from_record(
        IndexManifest,
        {
            **record,
            "measured": tuple(from_record(MeasuredRecall, entry) for entry in record["measured"]),
            "files": {
                name: from_record(FileRecord, entry) for name, entry in record["files"].items()
            },
        },
    )
