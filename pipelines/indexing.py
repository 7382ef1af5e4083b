"""Builds a FAISS index of a snapshot: exact, one for each modality, keys beside it.

Knows nothing of how the embeddings were made or who will query them. What an index is:
`pipelines.index_manifest`.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from ray._common.utils import get_system_memory

from pipelines import schema
from pipelines.errors import IndexMissingError, PipelineError, StoreError
from pipelines.index_manifest import (
    FORMAT_VERSION,
    INDEX_FILE,
    KEYS_FILE,
    MANIFEST_FILE,
    IndexManifest,
    find_index,
    index_dir,
    index_id_of,
    indexed_files,
)
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot, StoredFile, read_snapshot
from pipelines.store import Store
from pipelines.stored_samples import vectors_of

# Of the vectors as float32: themselves, what FAISS keeps free to grow into, and two copies while
# they are serialized and written. Of 250 MB of vectors, 3.3 to 3.5 were seen.
MEMORY_TIMES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Which store to index, and within what memory."""

    store_uri: str
    """A store with at least one snapshot."""
    snapshot: int | None = None
    """Its number; None: the current one."""
    max_memory_bytes: int | None = None
    """For the vectors and their serialized copies; None: half of this machine's memory, or of what
    its container may use."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        check_max_memory_bytes(self.max_memory_bytes)


def check_max_memory_bytes(max_memory_bytes: int | None) -> None:
    """Raise ValueError if a bound is none."""
    if max_memory_bytes is not None and max_memory_bytes < 1:
        raise ValueError(f"max_memory_bytes={max_memory_bytes}: expected at least 1")


def build_index(config: IndexConfig) -> list[IndexManifest]:
    """Index a snapshot, each modality by itself; an index that is there is kept.

    Raises:
        StoreError: There is no such snapshot, or the store cannot be read or written.
        PipelineError: The vectors do not fit in the memory allowed.
    """
    store = Store(config.store_uri)
    snapshot = read_snapshot(store, config.snapshot)
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
    return [
        find_index(store, snapshot, modality=modality)
        or _build(store, snapshot, modality=modality, max_memory_bytes=max_memory_bytes)
        for modality in snapshot.modalities
    ]


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
        content = _checked(store, f"{folder}/{INDEX_FILE}", sha256=manifest.index_sha256)
        index = faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
        content = _checked(store, f"{folder}/{KEYS_FILE}", sha256=manifest.keys_sha256)
        keys = pq.read_table(io.BytesIO(content))[schema.KEY]
    except (RuntimeError, KeyError, OSError, ValueError, pa.ArrowException) as error:
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


def check_memory(*, num_rows: int, embedding_dim: int, max_memory_bytes: int | None) -> None:
    """Raise PipelineError if an index of so many rows is beyond `IndexConfig.max_memory_bytes`."""
    max_bytes = get_system_memory() // 2 if max_memory_bytes is None else max_memory_bytes
    needed = MEMORY_TIMES * 4 * num_rows * embedding_dim
    if needed > max_bytes:
        raise PipelineError(
            f"max_memory_bytes={max_bytes}: an exact index of {num_rows} x {embedding_dim} needs "
            f"{needed}; use a machine with more memory or raise --max-memory-bytes"
        )


def _checked(store: Store, path: str, *, sha256: str | None) -> bytes:
    """A file's content; ValueError if its digest is not that of the manifest."""
    content = store.read(path)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not what was written")
    return content


def _build(
    store: Store, snapshot: Snapshot, *, modality: Modality, max_memory_bytes: int | None
) -> IndexManifest:
    num_rows = snapshot.num_rows("embeddings", modality=modality)
    check_memory(
        num_rows=num_rows,
        embedding_dim=snapshot.embedding_dim,
        max_memory_bytes=max_memory_bytes,
    )
    index = faiss.IndexFlatIP(snapshot.embedding_dim)
    keys = []
    for file_keys, vectors in read_embeddings(store, indexed_files(snapshot, modality=modality)):
        index.add(vectors)
        keys.append(file_keys)
    key_type = pa.int64() if snapshot.key_type == "int64" else pa.string()
    key_table = pa.table({schema.KEY: pa.chunked_array(keys, key_type)})
    key_buffer = io.BytesIO()
    pq.write_table(key_table, key_buffer)
    contents = {
        INDEX_FILE: faiss.serialize_index(index).tobytes(),
        KEYS_FILE: key_buffer.getvalue(),
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = IndexManifest(
        index_id=index_id_of(snapshot, modality=modality),
        engine_id=snapshot.engine.engine_id,
        modality=modality,
        num_rows=num_rows,
        embedding_dim=snapshot.embedding_dim,
        factory="Flat",
        index_sha256=digests[INDEX_FILE],
        keys_sha256=digests[KEYS_FILE],
    )
    folder = index_dir(snapshot, modality=modality)
    for name, content in contents.items():
        store.publish(f"{folder}/{name}", content)
    record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    store.publish(f"{folder}/{MANIFEST_FILE}", (json.dumps(record, indent=2) + "\n").encode())
    return manifest
