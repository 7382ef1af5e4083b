"""Opens a store's index and answers queries: the nearest rows to texts, images, keys and vectors.

Knows nothing of how the index was built or how answers are shown.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.registry import Registry
from pipelines import schema
from pipelines.engines import ready_engine
from pipelines.errors import QueryError, StoreError
from pipelines.errors import UnknownColumnError as UnknownColumnError
from pipelines.errors import UnknownKeyError as UnknownKeyError
from pipelines.indexes.comparisons import Kind, kind_of
from pipelines.indexes.filters import Condition, allowed_ids
from pipelines.indexes.opening import open_index
from pipelines.indexes.queries import Query
from pipelines.indexes.query_vectors import query_encoder
from pipelines.indexes.shown import shown
from pipelines.json_text import json_value
from pipelines.schema import Modality
from pipelines.snapshots import read_snapshot
from pipelines.store import Store

# Of conditions that were asked with lately; one is of a bit for each id.
NUM_BITMAPS = 8
_INTEGER = re.compile(r"-?[0-9]{1,19}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One row that was found."""

    key: str | int
    """Of the catalog."""
    score: float
    """Cosine similarity to the query's combined vector, -1 to 1."""
    columns: Mapping[str, Any]
    """Those carried from the catalog, as values that JSON has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What was found for one query."""

    hits: tuple[Hit, ...]
    """Best first."""
    notes: tuple[str, ...]
    """What to know of them, such as that a text was cut."""
    snapshot: int
    """Whose rows they are."""


class Searcher:
    """A store's current snapshot, ready to be asked, by several threads at once if need be."""

    def __init__(
        self, store_uri: str, *, engines_uri: str, modality: Modality | None = None
    ) -> None:
        """Open the index and the engine that its embeddings were made with.

        Args:
            store_uri: A store with an index.
            engines_uri: Where engines are kept; one that is missing is built.
            modality: What to search among; None: images, if the store has them.

        Raises:
            StoreError: The store is empty, damaged, or has no such embeddings.
            IndexMissingError: It is not indexed.
            CheckpointError, EngineError: The engine cannot be had.
        """
        store = Store(store_uri)
        snapshot = read_snapshot(store, None)
        if modality is not None and modality not in snapshot.modalities:
            raise StoreError(
                f"store {store_uri} has no {modality} embeddings "
                f"(it has: {', '.join(snapshot.modalities)})"
            )
        self.snapshot = snapshot
        self.modality: Modality = modality or snapshot.modalities[0]
        self._index = open_index(store, snapshot, modality=self.modality)
        self._rows = self._index.rows
        self.build_id = self._index.manifest.build_id
        """Of the index: one that is built anew for the same snapshot has another."""
        self.index_manifest = self._index.manifest
        """What the index is, and what it finds."""
        self.columns: Mapping[str, Kind] = {
            field.name: kind_of(field.type)
            for field in self._rows.schema
            if field.name != schema.KEY
        }
        """Those carried from the catalog, and of what kind they are."""
        engine = ready_engine(snapshot.engine, registry=Registry(engines_uri))
        self._encoder = query_encoder(engine.directory)
        self._bitmaps: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._bitmaps_lock = Lock()

    @property
    def num_rows(self) -> int:
        """Rows that are searched."""
        return self._rows.num_rows

    def check(self, queries: Sequence[Query]) -> None:
        """See whether queries can be asked, as far as is seen before they are encoded.

        Raises:
            UnknownKeyError: A key is not there.
            ValueError: A vector is of another size, or a text is asked of an engine for images.
        """
        for query in queries:
            for part in query.parts:
                if part.key is not None:
                    self._known_id(part.key)
                self._encoder.check(part)

    def search(
        self, queries: Sequence[Query], *, num_hits: int, where: Sequence[Condition] = ()
    ) -> list[Answer]:
        """The nearest rows to each query, best first; never one whose key is part of the query.

        Args:
            queries: Encoded together.
            num_hits: For each; fewer only where there are no more.
            where: Of these all hold for every hit.

        Raises:
            UnknownKeyError: A key that is asked with is not there.
            UnknownColumnError: There is no column of a condition.
            ValueError: Anything else that cannot be asked (`ImageRejected`: an image that is none).
        """
        if num_hits < 1:
            raise QueryError(f"num_hits={num_hits}: expected at least 1")
        if not queries:
            return []
        allowed = self._allowed(where) if where else None
        own = [
            {self._known_id(part.key) for part in query.parts if part.key is not None}
            for query in queries
        ]
        vectors, notes = self._encoder.encode(queries, vector_of=self._vector_of)
        num_found = min(num_hits + max(map(len, own)), self.num_rows)
        if num_found == 0:
            return [self._answer([], notes=noted) for noted in notes]
        scores, ids = self._index.search(vectors, num_hits=num_found, allowed=allowed)
        return [
            self._answer(
                [
                    (row_id, score)
                    for row_id, score in zip(row_ids, row_scores, strict=True)
                    if row_id >= 0 and row_id not in own_ids
                ][:num_hits],
                notes=noted,
            )
            for row_ids, row_scores, own_ids, noted in zip(
                ids.tolist(), scores.tolist(), own, notes, strict=True
            )
        ]

    def columns_of(self, key: str | int) -> Mapping[str, Any] | None:
        """The carried columns of a key, as values that JSON has; None if it is not there."""
        row_id = self._id_of(key)
        return None if row_id is None else self._columns(row_id)

    def _answer(self, found: Sequence[tuple[int, float]], *, notes: tuple[str, ...]) -> Answer:
        hits = []
        for row_id, score in found:
            key = self._rows.key_of(row_id)
            assert key is not None
            hits.append(Hit(key=key, score=score, columns=self._columns(row_id)))
        return Answer(hits=tuple(hits), notes=notes, snapshot=self.snapshot.number)

    def _columns(self, row_id: int) -> dict[str, Any]:
        (columns,) = self._rows.columns_of([row_id])
        return {name: json_value(value) for name, value in columns.items()}

    def _allowed(self, where: Sequence[Condition]) -> NDArray[np.uint8]:
        # Their text, since 1 equals True, and is not the same to ask for.
        name = repr(sorted(map(repr, where)))
        with self._bitmaps_lock:
            if name in self._bitmaps:
                self._bitmaps.move_to_end(name)
                return self._bitmaps[name]
        bitmap = allowed_ids(self._rows, where)
        with self._bitmaps_lock:
            self._bitmaps[name] = bitmap
            while len(self._bitmaps) > NUM_BITMAPS:
                self._bitmaps.popitem(last=False)
        return bitmap

    def _vector_of(self, key: str | int) -> NDArray[np.float32]:
        return self._index.vector_of(self._known_id(key))

    def _known_id(self, key: str | int) -> int:
        row_id = self._id_of(key)
        if row_id is None:
            raise UnknownKeyError(
                f"no {self.modality} embedding of key {shown(key)} in snapshot "
                f"{self.snapshot.number} (its keys are of type {self.snapshot.key_type}); "
                "ask with another"
            )
        return row_id

    def _id_of(self, key: str | int) -> int | None:
        # A command line, and a browser of large integers, has text alone.
        if self._rows.key_type == pa.int64() and isinstance(key, str) and _INTEGER.fullmatch(key):
            key = int(key)
        return self._rows.id_of(key)
