"""Builds a FAISS index of a snapshot: exact, one for each modality, keys beside it.

Knows nothing of how the embeddings were made or who will query them. An index is named for what
it holds, so that snapshots of the same embeddings share one.

    indexes/00112233445566778899aabbccddeeff/
      index.faiss      inner products of unit vectors: cosine similarity
      keys.parquet     row i is the key of id i
      manifest.json    written last
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import schema
from pipelines.errors import IndexMissingError, PipelineError, StoreError
from pipelines.fingerprints import index_id
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot, StoredFile, read_snapshot
from pipelines.store import Store
from pipelines.stored_samples import vectors_of

FORMAT_VERSION = 1
INDEXES_DIR = "indexes"
INDEX_FILE, KEYS_FILE, MANIFEST_FILE = "index.faiss", "keys.parquet", "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Which store to index, and within what memory."""

    store_uri: str
    """A store with at least one snapshot."""
    max_memory_bytes: int | None = None
    """For the vectors and their serialized copy; None: half of this machine's memory."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.max_memory_bytes is not None and self.max_memory_bytes < 1:
            raise ValueError(f"max_memory_bytes={self.max_memory_bytes}: expected at least 1")


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


def build_index(config: IndexConfig) -> list[IndexManifest]:
    """Index the current snapshot, each modality by itself; an index that is there is kept.

    Raises:
        StoreError: There is no snapshot, or the store cannot be read or written.
        PipelineError: The vectors do not fit in the memory allowed.
    """
    store = Store(config.store_uri)
    snapshot = read_snapshot(store, None)
    return index_snapshot(store, snapshot, max_memory_bytes=config.max_memory_bytes)


def index_snapshot(
    store: Store, snapshot: Snapshot, *, max_memory_bytes: int | None = None
) -> list[IndexManifest]:
    """Index a snapshot, also one that is not committed yet; an index that is there is kept.

    Args:
        store: Where its files lie.
        snapshot: Each of its modalities is indexed by itself.
        max_memory_bytes: `IndexConfig.max_memory_bytes`.

    Raises:
        StoreError: The store cannot be read or written.
        PipelineError: The vectors do not fit in the memory allowed.
    """
    max_bytes = max_memory_bytes or _memory_bytes() // 2
    return [
        find_index(store, snapshot, modality=modality)
        or _build(store, snapshot, modality=modality, max_bytes=max_bytes)
        for modality in snapshot.modalities
    ]


def index_dir(snapshot: Snapshot, *, modality: Modality) -> str:
    """Where an index lies, relative to the store's root."""
    return f"{INDEXES_DIR}/{_index_id(snapshot, modality=modality)}"


def _index_id(snapshot: Snapshot, *, modality: Modality) -> str:
    # Paths stand for contents: each file is written once, under a name drawn for it.
    paths = [file.path for file in _indexed_files(snapshot, modality=modality)]
    return index_id([modality, snapshot.engine.engine_id, *paths])


def _indexed_files(snapshot: Snapshot, *, modality: Modality) -> list[StoredFile]:
    """In one order whatever the snapshot's, so that all who build an index write the same bytes."""
    files = snapshot.files_of("embeddings", modality=modality)
    return sorted(files, key=lambda file: file.path)


def find_index(store: Store, snapshot: Snapshot, *, modality: Modality) -> IndexManifest | None:
    """The index of a snapshot's modality, None if it is not (wholly) built."""
    path = f"{index_dir(snapshot, modality=modality)}/{MANIFEST_FILE}"
    if path not in store.list(index_dir(snapshot, modality=modality), suffix=MANIFEST_FILE):
        return None
    try:
        record: dict[str, Any] = json.loads(store.read(path))
        version = record.pop("format_version")
        if version > FORMAT_VERSION:
            raise StoreError(
                f"store {store.uri}: {path} is of format {version}, this Clipmill reads "
                f"{FORMAT_VERSION}; upgrade Clipmill"
            )
        return IndexManifest(**record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"store {store.uri}: {path} is damaged ({error}); remove the folder it is in and run "
            "`clipmill index` again"
        ) from error


def remove_index(store: Store, snapshot: Snapshot, *, modality: Modality) -> None:
    """Remove an index, its manifest first: nobody finds half of it. StoreError if it fails."""
    folder = index_dir(snapshot, modality=modality)
    store.remove(f"{folder}/{MANIFEST_FILE}")
    store.remove(folder)


def load_index(store: Store, snapshot: Snapshot, *, modality: Modality) -> tuple[Any, pa.Array]:
    """Load an index and its keys.

    Returns:
        The FAISS index, and keys [num_rows] (string or int64) by id.

    Raises:
        IndexMissingError: It is not built.
        StoreError: A file is damaged.
    """
    manifest = find_index(store, snapshot, modality=modality)
    if manifest is None:
        raise IndexMissingError(
            f"store {store.uri}: no index of {modality} embeddings of snapshot "
            f"{snapshot.number}; run `clipmill index --store {store.uri}`"
        )
    folder = index_dir(snapshot, modality=modality)
    try:
        index = faiss.deserialize_index(
            np.frombuffer(store.read(f"{folder}/{INDEX_FILE}"), dtype=np.uint8)
        )
        keys = pq.read_table(io.BytesIO(store.read(f"{folder}/{KEYS_FILE}")))[schema.KEY]
    except (RuntimeError, KeyError, pa.ArrowException) as error:
        raise StoreError(
            f"store {store.uri}: {folder} is damaged ({str(error).splitlines()[0]}); remove the "
            "folder and run `clipmill index` again"
        ) from error
    if not index.ntotal == len(keys) == manifest.num_rows:
        raise StoreError(
            f"store {store.uri}: {folder} has {index.ntotal} vectors, {len(keys)} keys and "
            f"{manifest.num_rows} rows in its manifest; remove the folder and run "
            "`clipmill index` again"
        )
    return index, keys.combine_chunks()


def read_embeddings(
    store: Store, files: list[StoredFile]
) -> Iterator[tuple[pa.Array, NDArray[np.float32]]]:
    """Keys [N] and embeddings float32 [N, D] of each file."""
    for stored in files:
        with store.open(stored.path) as file:
            table = pq.read_table(file, columns=[schema.KEY, schema.EMBEDDING])
        yield table[schema.KEY].combine_chunks(), vectors_of(table)


def search_among(
    index: Any, vectors: NDArray[np.float32], *, ids: NDArray[np.int64], num_hits: int
) -> NDArray[np.int64]:
    """Ids int64 [N, num_hits] of the nearest among some rows of an index, best first, -1 for none.

    Args:
        index: From `load_index`.
        vectors: float32 [N, D], unit norm.
        ids: Of the rows that may be answers.
        num_hits: For each vector.
    """
    among = faiss.SearchParameters(sel=faiss.IDSelectorBatch(ids))  # type: ignore[call-arg]
    _, found = index.search(vectors, num_hits, params=among)
    return np.asarray(found, dtype=np.int64)


def _build(
    store: Store, snapshot: Snapshot, *, modality: Modality, max_bytes: int
) -> IndexManifest:
    num_rows = snapshot.num_rows("embeddings", modality=modality)
    # The vectors, and twice more while they are serialized and handed over.
    needed = 3 * 4 * num_rows * snapshot.embedding_dim
    if needed > max_bytes:
        raise PipelineError(
            f"max_memory_bytes={max_bytes}: an exact index of {num_rows} x "
            f"{snapshot.embedding_dim} needs {needed}; use a machine with more memory or raise "
            "--max-memory-bytes"
        )
    index = faiss.IndexFlatIP(snapshot.embedding_dim)
    keys = []
    for file_keys, vectors in read_embeddings(store, _indexed_files(snapshot, modality=modality)):
        index.add(vectors)
        keys.append(file_keys)
    key_type = pa.int64() if snapshot.key_type == "int64" else pa.string()
    key_table = pa.table({schema.KEY: pa.chunked_array(keys, key_type)})
    manifest = IndexManifest(
        index_id=_index_id(snapshot, modality=modality),
        engine_id=snapshot.engine.engine_id,
        modality=modality,
        num_rows=num_rows,
        embedding_dim=snapshot.embedding_dim,
        factory="Flat",
    )
    folder = index_dir(snapshot, modality=modality)
    buffer = io.BytesIO()
    pq.write_table(key_table, buffer)
    store.publish(f"{folder}/{INDEX_FILE}", faiss.serialize_index(index).tobytes())
    store.publish(f"{folder}/{KEYS_FILE}", buffer.getvalue())
    record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    store.publish(f"{folder}/{MANIFEST_FILE}", (json.dumps(record, indent=2) + "\n").encode())
    return manifest


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
