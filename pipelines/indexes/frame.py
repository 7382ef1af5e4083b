"""The coordinates in which an index holds vectors: less their mean, scaled, perhaps rotated.

Knows nothing of FAISS.

CLIP's images share a direction, its texts another. With the mean of the rows taken from each row
(and not from the query), inner products change by a constant for each query, so answers stay in
order; but what sets rows apart is now all there is to cluster and to quantize. Of the lists that
hold a text's nearest images, far fewer have to be searched then. The scale makes rows as long as
the unit centroids of their lists, so that residuals are short; the rotation spreads what is in
few dimensions over all, as codes of a few bits for each dimension want it.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipelines.indexes.array_files import arrays_from_bytes, arrays_to_bytes

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One choice of coordinates."""

    mean: Vectors
    """float32 [D]: of the rows that were sampled."""
    scale: float
    """What rows are multiplied with."""
    rotation: Vectors | None
    """float32 [D, D], orthogonal; None: none."""

    def of_rows(self, vectors: Vectors) -> Vectors:
        """Rows float32 [N, D] in these coordinates."""
        moved = (vectors - self.mean) * np.float32(self.scale)
        turned = moved if self.rotation is None else moved @ self.rotation
        return np.asarray(turned, dtype=np.float32)

    def of_queries(self, vectors: Vectors) -> Vectors:
        """Queries float32 [N, D] in these coordinates."""
        turned = vectors if self.rotation is None else vectors @ self.rotation
        return np.ascontiguousarray(turned)

    def row_of(self, vector: Vectors) -> Vectors:
        """The row float32 [D] that a vector in these coordinates is of."""
        turned = vector if self.rotation is None else self.rotation @ vector
        return np.asarray(turned / self.scale + self.mean, dtype=np.float32)

    def cosines(self, products: Vectors, vectors: Vectors) -> Vectors:
        """Cosines [N, K] of what products [N, K] are of queries [N, D] and rows in here."""
        scores = products / np.float32(self.scale) + (vectors @ self.mean)[:, None]
        return np.asarray(scores, dtype=np.float32)

    def to_bytes(self) -> bytes:
        """The content of a file."""
        arrays = {"mean": self.mean, "scale": np.array(self.scale)}
        if self.rotation is not None:
            arrays["rotation"] = self.rotation
        return arrays_to_bytes(arrays)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read it back; ValueError or KeyError if it is damaged."""
        arrays = arrays_from_bytes(content)
        return cls(
            mean=arrays["mean"], scale=float(arrays["scale"]), rotation=arrays.get("rotation")
        )


def identity(embedding_dim: int) -> Frame:
    """Vectors as they are."""
    return Frame(mean=np.zeros(embedding_dim, dtype=np.float32), scale=1.0, rotation=None)


def random_rotation(embedding_dim: int, *, seed: int) -> Vectors:
    """An orthogonal matrix float32 [D, D], each as likely as any other (QR of a Gaussian one)."""
    gaussian = np.random.default_rng(seed).standard_normal((embedding_dim, embedding_dim))
    rotation, upper = np.linalg.qr(gaussian)
    return np.asarray(rotation * np.sign(np.diag(upper)), dtype=np.float32)
