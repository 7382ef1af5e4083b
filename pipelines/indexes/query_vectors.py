"""Encodes queries: the unit vector of the weighted sum of each one's parts.

Knows nothing of what is searched with them.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.images import ImageLimits
from engine.preprocess import decode_pixels
from pipelines.errors import QueryError
from pipelines.indexes.queries import Part, Query

Vectors = NDArray[np.float32]

# A sum shorter than this, of weights of which the largest is 1, is rounding alone.
LEAST_NORM = 1e-4
_SHOWN_CHARACTERS = 40

_loaded: "WeakValueDictionary[Path, QueryEncoder]" = WeakValueDictionary()
_loading = Lock()


def query_encoder(engine_dir: Path) -> "QueryEncoder":
    """The encoder of an engine, which all who hold it share: it takes its weights' memory once.

    Raises:
        EngineError: The folder holds no whole engine.
    """
    with _loading:
        found = _loaded.get(engine_dir)
        if found is None:
            found = QueryEncoder(engine_dir, num_threads=len(os.sched_getaffinity(0)))
            _loaded[engine_dir] = found
        return found


class QueryEncoder:
    """An engine on the CPU, which runs the graphs of all engines: queries are short."""

    def __init__(self, engine_dir: Path, *, num_threads: int) -> None:
        """Load it; EngineError if the folder holds no whole engine."""
        self._encoder = OnnxCpuEncoder(engine_dir, num_threads=num_threads)
        self._manifest = self._encoder.manifest

    def check(self, part: Part) -> None:
        """ValueError for a part that this engine has no vector for, as far as is seen at once."""
        if part.text is not None and self._manifest.text is None:
            raise QueryError(
                f"{self._manifest.checkpoint} embeds images alone, and no text such as "
                f"{_shown(part.text)}; ask with an image, a key or a vector"
            )
        dim = self._manifest.embedding_dim
        if part.vector is not None and len(part.vector) != dim:
            raise QueryError(
                f"a query's vector has {len(part.vector)} numbers, the embeddings have {dim}; use "
                f"one of engine {self._manifest.engine_id}"
            )

    def encode(
        self, queries: Sequence[Query], *, vector_of: Callable[[str | int], Vectors]
    ) -> tuple[Vectors, list[tuple[str, ...]]]:
        """Encode all texts of all queries together, and all images.

        Args:
            queries: Any number of them.
            vector_of: Gives the unit vector of a key that is a part.

        Returns:
            Vectors float32 [N, D] of unit norm, and for each query its notes: which of its texts
            were cut.

        Raises:
            ValueError: A part has no vector or one of another size, or the parts cancel out
                (`ImageRejected`: an image is none).
        """
        parts = [part for query in queries for part in query.parts]
        for part in parts:
            self.check(part)
        texts = [part.text for part in parts if part.text is not None]
        images = [part.image for part in parts if part.image is not None]
        text_vectors, cut = iter(self._texts(texts)), iter(self._encoder.are_cut(texts))
        image_vectors = iter(self._images(images))
        vectors, notes = [], []
        for query in queries:
            found = []
            noted = []
            for part in query.parts:
                if part.text is not None:
                    found.append(next(text_vectors))
                    noted += [self._note(part.text)] if next(cut) else []
                elif part.image is not None:
                    found.append(next(image_vectors))
                elif part.key is not None:
                    found.append(vector_of(part.key))
                else:
                    found.append(_given(part))
            vectors.append(_combined(query.parts, found))
            notes.append(tuple(noted))
        dim = self._manifest.embedding_dim
        return np.asarray(vectors, dtype=np.float32).reshape(-1, dim), notes

    def _texts(self, texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.empty((0, self._manifest.embedding_dim), dtype=np.float32)
        vectors = self._encoder.encode_texts(texts)
        for text, vector in zip(texts, vectors, strict=True):
            _check_encoded(vector, what=f"text {_shown(text)}")
        return vectors

    def _images(self, images: Sequence[bytes]) -> Vectors:
        if not images:
            return np.empty((0, self._manifest.embedding_dim), dtype=np.float32)
        pixels = [
            decode_pixels(image, preprocessing=self._manifest.preprocessing, limits=ImageLimits())
            for image in images
        ]
        vectors = self._encoder.encode_images(np.stack(pixels))
        for vector in vectors:
            _check_encoded(vector, what="the image")
        return vectors

    def _note(self, text: str) -> str:
        assert self._manifest.text is not None
        return f"text {_shown(text)} was cut to {self._manifest.text.max_tokens} tokens"


def _given(part: Part) -> NDArray[np.float64]:
    assert part.vector is not None
    vector = np.asarray(part.vector, dtype=np.float64)
    vector /= np.abs(vector).max()  # squares of the largest float64 are beyond it
    unit: NDArray[np.float64] = vector / np.linalg.norm(vector)
    return unit


def _combined(parts: Sequence[Part], vectors: Sequence[NDArray[np.floating]]) -> Vectors:
    weights = np.array([part.weight for part in parts], dtype=np.float64)
    weights /= np.abs(weights).max()
    combined = weights @ np.stack(vectors).astype(np.float64)
    norm = np.linalg.norm(combined)
    if norm < LEAST_NORM:
        raise QueryError(
            "the parts of a query cancel out, and leave no direction to look in; change a weight "
            "or a part"
        )
    unit: Vectors = (combined / norm).astype(np.float32)
    return unit


def _check_encoded(vector: Vectors, *, what: str) -> None:
    if not np.isfinite(vector).all():
        raise QueryError(f"the engine gives no embedding for {what}; ask with another")


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")
