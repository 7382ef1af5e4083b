"""Queries whose exact answers are known: drawn, answered by a full search, kept over changes.

Knows nothing of indexes. Recall is measured with these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import faiss
import numpy as np
from numpy.typing import NDArray

from pipelines.indexes.array_files import arrays_from_bytes, arrays_to_bytes
from pipelines.indexes.bitmaps import Bitmap, is_set

# Kept for each query. Recall looks at the first 100: of the others some may go before all rows
# have to be searched again.
DEPTH = 200
MAX_RECALL_K = 100

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Truth:
    """Queries and their exact answers."""

    kinds: tuple[str, ...]
    """Of queries: image, text, or own."""
    kind_of: NDArray[np.int64]
    """int64 [Q]: which of the kinds a query is of."""
    vectors: Vectors
    """float32 [Q, D], unit norm."""
    own_ids: Ids
    """int64 [Q]: the row that a query is itself, which is no answer to it; -1: none."""
    ids: Ids
    """int64 [Q, DEPTH]: the nearest rows, best first; -1: there are no more."""
    scores: Vectors
    """float32 [Q, DEPTH]: their cosines, -inf where there is none."""
    floors: Vectors
    """float32 [Q]: rows of a lower cosine may be missing; -inf: none is."""

    @classmethod
    def unanswered(cls, queries: Sequence[tuple[str, Vectors, Ids]], *, embedding_dim: int) -> Self:
        """Queries alone: of each kind their vectors and own ids."""
        counts = [len(vectors) for _, vectors, _ in queries]
        none = np.zeros((0, embedding_dim), dtype=np.float32)
        num = sum(counts)
        return cls(
            kinds=tuple(kind for kind, _, _ in queries),
            kind_of=np.repeat(np.arange(len(counts)), np.array(counts, dtype=np.int64)),
            vectors=np.concatenate([none, *(vectors for _, vectors, _ in queries)]),
            own_ids=np.concatenate([np.zeros(0, np.int64), *(ids for _, _, ids in queries)]),
            ids=np.full((num, DEPTH), -1, dtype=np.int64),
            scores=np.full((num, DEPTH), -np.inf, dtype=np.float32),
            floors=np.full(num, -np.inf, dtype=np.float32),
        )

    def with_rows(self, vectors: Vectors, ids: Ids) -> Self:
        """The same with rows float32 [N, D] of ids int64 [N] among what is searched."""
        if not len(ids) or not len(self.vectors):
            return self
        num = min(DEPTH + 1, len(ids))
        scores, places = faiss.knn(self.vectors, vectors, num, metric=faiss.METRIC_INNER_PRODUCT)
        floors = scores[:, -1] if num < len(ids) else np.full(len(scores), -np.inf)
        return self._merged(ids[places], scores, floors)

    def merged(self, other: Self) -> Self:
        """The same queries, answered from the rows of both; ValueError if they are others."""
        if not np.array_equal(self.vectors, other.vectors):
            raise ValueError("answers to other queries")
        return self._merged(other.ids, other.scores, other.floors)

    def without(self, removed: Bitmap) -> Self:
        """The same without some rows, which may leave fewer answers; see `is_deep_enough`."""
        gone = _in_set(removed, self.ids)
        scores = np.where(gone, -np.inf, self.scores).astype(np.float32)
        # Another row may get the id of one that is gone.
        own_ids = np.where(_in_set(removed, self.own_ids), -1, self.own_ids)
        return replace(self, own_ids=own_ids)._sorted(np.where(gone, -1, self.ids), scores)

    def unanswered_again(self) -> Self:
        """The same queries without any answers."""
        return replace(
            self,
            ids=np.full_like(self.ids, -1),
            scores=np.full_like(self.scores, -np.inf),
            floors=np.full_like(self.floors, -np.inf),
        )

    def is_deep_enough(self, num_rows: int) -> bool:
        """Whether the first 100 answers are still known, of so many rows that are there."""
        wanted = np.minimum(MAX_RECALL_K, num_rows - (self.own_ids >= 0))
        return bool(((self.ids >= 0).sum(axis=1) >= wanted).all())

    def to_bytes(self) -> bytes:
        """The content of a file."""
        names = [field.name for field in fields(self) if field.name != "kinds"]
        arrays = {name: getattr(self, name) for name in names}
        return arrays_to_bytes({"kinds": np.array(self.kinds, dtype=np.str_), **arrays})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read it back; ValueError or KeyError if it is damaged."""
        arrays = arrays_from_bytes(content)
        kinds = tuple(arrays.pop("kinds").tolist())
        return cls(kinds=kinds, **{field.name: arrays[field.name] for field in fields(cls)[1:]})

    def _merged(self, ids: Ids, scores: Vectors, floors: Vectors) -> Self:
        floors = np.maximum(self.floors, floors).astype(np.float32)
        ids = np.concatenate([self.ids, ids], axis=1)
        scores = np.concatenate([self.scores, scores], axis=1)
        is_none = (ids == self.own_ids[:, None]) | (scores < floors[:, None])
        return replace(self, floors=floors)._sorted(
            np.where(is_none, -1, ids), np.where(is_none, -np.inf, scores).astype(np.float32)
        )

    def _sorted(self, ids: Ids, scores: Vectors) -> Self:
        # Equal scores by id, so that the order in which rows came does not matter.
        order = np.lexsort((ids, -scores), axis=1)
        ids = np.take_along_axis(ids, order, axis=1)
        scores = np.take_along_axis(scores, order, axis=1)
        is_cut = (ids[:, DEPTH:] >= 0).any(axis=1)
        floors = np.where(is_cut, scores[:, DEPTH - 1], self.floors).astype(np.float32)
        return replace(self, ids=ids[:, :DEPTH], scores=scores[:, :DEPTH], floors=floors)


def _in_set(bitmap: Bitmap, ids: Ids) -> NDArray[np.bool_]:
    return (ids >= 0) & is_set(bitmap, np.maximum(ids, 0))
