"""Opens a store's index and answers queries: the nearest keys to a text, an image or a vector.

Knows nothing of how the index was built or how answers are shown.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.images import ImageLimits
from engine.preprocess import decode_pixels
from engine.registry import Registry
from pipelines.engines import ready_engine
from pipelines.errors import StoreError
from pipelines.indexing import load_index
from pipelines.schema import Modality
from pipelines.snapshots import read_snapshot
from pipelines.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One answer."""

    key: str | int
    """Of the catalog."""
    score: float
    """Cosine similarity, -1 to 1."""


class Searcher:
    """A store's current snapshot, ready to be asked."""

    def __init__(self, store_uri: str, *, engines_uri: str, modality: Modality | None) -> None:
        """Load the index and the engine that its embeddings were made with.

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
        self._index, self._keys = load_index(store, snapshot, modality=self.modality)
        engine = ready_engine(snapshot.engine, registry=Registry(engines_uri))
        # A query is short, and the CPU runs the graphs of all engines.
        self._encoder = OnnxCpuEncoder(engine.directory, num_threads=os.cpu_count() or 1)

    def by_text(self, texts: Sequence[str], *, num_hits: int) -> list[list[Hit]]:
        """The nearest keys to each text, best first; ValueError for an empty text."""
        for text in texts:
            if not text.strip():
                raise ValueError("query text is empty; write what to look for")
        return self.by_vector(self._encoder.encode_texts(texts), num_hits=num_hits)

    def by_image(self, images: Sequence[bytes], *, num_hits: int) -> list[list[Hit]]:
        """The nearest keys to each encoded image, best first.

        Raises:
            ImageRejected: (a ValueError) one of them is no usable image.
        """
        preprocessing = self._encoder.manifest.preprocessing
        pixels = [
            decode_pixels(image, preprocessing=preprocessing, limits=ImageLimits())
            for image in images
        ]
        return self.by_vector(self._encoder.encode_images(np.stack(pixels)), num_hits=num_hits)

    def by_vector(self, vectors: NDArray[np.float32], *, num_hits: int) -> list[list[Hit]]:
        """The nearest keys to each vector float32 [N, D] of unit norm, best first.

        Returns:
            For each vector `num_hits` hits, or as many as there are rows.
        """
        if num_hits < 1:
            raise ValueError(f"num_hits={num_hits}: expected at least 1")
        if not np.isfinite(vectors).all():
            raise ValueError(
                "a vector holds values that are not finite; from a text or image: the engine gives "
                "no embedding for it"
            )
        expected = self.snapshot.embedding_dim
        if vectors.ndim != 2 or vectors.shape[1] != expected:
            raise ValueError(f"vectors are {list(vectors.shape)}, expected [N, {expected}]")
        num_hits = min(num_hits, len(self._keys))
        if num_hits == 0:
            return [[] for _ in vectors]
        scores, ids = self._index.search(np.ascontiguousarray(vectors), num_hits)
        return [
            [
                Hit(key=self._keys[row].as_py(), score=float(score))
                for row, score in zip(row_ids, row_scores, strict=True)
            ]
            for row_ids, row_scores in zip(ids.tolist(), scores.tolist(), strict=True)
        ]
