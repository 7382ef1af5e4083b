"""How well the pairs of a store find each other: recall of a key's image by its text, and back.

Knows nothing of how queries are encoded; both sides are in the store.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.errors import StoreError
from pipelines.indexes.opening import open_index
from pipelines.indexes.shards import read_vectors
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot, current_snapshot
from pipelines.store import Store

QUERY_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRecall:
    """Recall of one direction."""

    query: Modality
    """What was asked with."""
    among: Modality
    """What was searched."""
    num_queries: int
    """Keys that have both."""
    num_rows: int
    """Rows searched."""
    recall: dict[int, float]
    """k -> share of queries whose own key is among the first k."""
    search_seconds: float
    """Median of one query's search, encoding not included."""


def pair_recall(
    store_uri: str, *, ks: Sequence[int] = (1, 5, 10), max_queries: int = 10_000
) -> list[PairRecall]:
    """Measure text-to-image and image-to-text recall over the keys that have both.

    Args:
        store_uri: An indexed store of images and texts.
        ks: Cut-offs.
        max_queries: Of more pairs, the first of these many are asked.

    Raises:
        StoreError: The store has no snapshot, or not both modalities.
        IndexMissingError: It is not indexed.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={list(ks)}: expected cut-offs of at least 1")
    store = Store(store_uri)
    snapshot = current_snapshot(store)
    if snapshot is None or len(snapshot.modalities) < 2:
        raise StoreError(f"store {store_uri} holds no pairs of image and text to measure with")
    results = []
    directions: tuple[tuple[Modality, Modality], ...] = (("text", "image"), ("image", "text"))
    for query, among in directions:
        index = open_index(store, snapshot, modality=among)
        num_rows = index.manifest.num_rows
        num_hits = max(min(max(ks), num_rows), 1)
        ranks: list[int] = []
        seconds: list[float] = []
        for query_keys, vectors in _stored_vectors(store, snapshot, modality=query):
            own = index.rows.ids_of(query_keys)
            paired = np.flatnonzero(own >= 0)[: max_queries - len(ranks)]
            for first in range(0, len(paired), QUERY_ROWS):
                asked = paired[first : first + QUERY_ROWS]
                _, found = index.search(vectors[asked], num_hits=num_hits)
                hits = found == own[asked][:, None]
                ranks += np.where(hits.any(axis=1), hits.argmax(axis=1), max(ks)).tolist()
            for row in paired[:20]:
                started = time.perf_counter()
                index.search(vectors[row : row + 1], num_hits=num_hits)
                seconds.append(time.perf_counter() - started)
            if len(ranks) >= max_queries:
                break
        results.append(
            PairRecall(
                query=query,
                among=among,
                num_queries=len(ranks),
                num_rows=num_rows,
                recall={k: float(np.mean(np.array(ranks) < k)) if ranks else 0.0 for k in ks},
                search_seconds=float(np.median(seconds)) if seconds else 0.0,
            )
        )
    return results


def _stored_vectors(
    store: Store, snapshot: Snapshot, *, modality: Modality
) -> Iterator[tuple[pa.Array, NDArray[np.float32]]]:
    for file in snapshot.files_of("embeddings", modality=modality):
        yield from read_vectors(store, file)


def recall_line(result: PairRecall) -> str:
    """One direction in one line."""
    recalls = ", ".join(f"@{k} {recall:.3f}" for k, recall in result.recall.items())
    return (
        f"{result.query}-to-{result.among} recall {recalls} "
        f"({result.num_queries:,} queries, {result.num_rows:,} rows, "
        f"{result.search_seconds * 1e3:.2f} ms a search)"
    )
