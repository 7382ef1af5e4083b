"""What an index is, where it lies, and whether it is there.

Knows nothing of FAISS. An index is named for what it holds, so that snapshots of the same
embeddings share one.

    indexes/00112233445566778899aabbccddeeff/
      index.faiss      inner products of unit vectors: cosine similarity
      keys.parquet     row i is the key of id i
      manifest.json    written last
"""

from dataclasses import dataclass
from functools import partial

from pipelines.errors import IndexMissingError
from pipelines.fingerprints import index_id
from pipelines.manifests import from_record, read_manifest
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot, StoredFile, read_snapshot
from pipelines.store import Store

FORMAT_VERSION = 1
INDEXES_DIR = "indexes"
INDEX_FILE, KEYS_FILE, MANIFEST_FILE = "index.faiss", "keys.parquet", "manifest.json"
WAY_OUT = "remove the folder it is in and run `clipmill index` again"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexManifest:
    """One index, complete."""

    index_id: str
    """Names its folder: a hash of modality, engine and the files of embeddings in it."""
    engine_id: str
    """Queries must be encoded by the same engine."""
    modality: Modality
    """Of the embeddings."""
    num_rows: int
    """Vectors and keys."""
    embedding_dim: int
    """D."""
    factory: str
    """FAISS's name of the index type."""
    index_sha256: str | None = None
    """Of `index.faiss`: FAISS itself loads vectors with a flipped bit. None in old manifests."""
    keys_sha256: str | None = None
    """Of `keys.parquet`; as before."""


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
        store,
        path,
        format_version=FORMAT_VERSION,
        build=partial(from_record, IndexManifest),
        way_out=WAY_OUT,
    )


def remove_index(store: Store, snapshot: Snapshot, *, modality: Modality) -> None:
    """Remove an index, its manifest first: nobody finds half of it. StoreError if it fails."""
    folder = index_dir(snapshot, modality=modality)
    store.remove(f"{folder}/{MANIFEST_FILE}")
    store.remove(folder)


def missing_indexes(store: Store, snapshot: Snapshot) -> list[Modality]:
    """Modalities of a snapshot that have no index; StoreError if the store cannot be read."""
    find = partial(find_index, store, snapshot)
    return [modality for modality in snapshot.modalities if find(modality=modality) is None]


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
