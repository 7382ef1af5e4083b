"""Vectors like CLIP's, made at random: clusters of many sizes, images and texts in cones apart.

Knows nothing of indexes. Of two images the mean cosine is 0.5, and 0.8 of the nearest of 800;
variance over dimensions falls off as by rank to -0.9, with a participation ratio of some 45. (800
photos by CLIP ViT-B/16: 0.55, 0.80, -0.91 and 50.) A text has an image's cluster in common with it,
and no more: the cosine of the nearest is 0.27, as CLIP's are.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Rng = np.random.Generator

ROWS_PER_CLUSTER = 200
# Shares of the squared norm: what all have in common, what a cluster has, and what is a row's own.
_IMAGE_SHARES = (0.5, 0.3, 0.2)
_TEXT_SHARES = (0.6, 0.2, 0.2)
# Of cluster sizes, and of the spread over dimensions: CLIP's fall off in like manner.
_ZIPF, _SPECTRUM = 0.7, 0.45
_BATCH_ROWS = 50_000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipLike:
    """A distribution of images and texts."""

    shared: Vectors
    """float32 [2, D]: of images and of texts."""
    clusters: Vectors
    """float32 [num_clusters, D], unit norm."""
    shares: NDArray[np.float64]
    """float64 [num_clusters]: of the rows."""
    spread: Vectors
    """float32 [D]: of each dimension."""
    rotation: Vectors
    """float32 [D, D], orthogonal."""

    def images(self, num_rows: int, *, rng: Rng) -> Iterator[Vectors]:
        """So many images, float32 [N, D] of unit norm at a time."""
        yield from self._drawn(num_rows, rng, kind=0, shares=_IMAGE_SHARES)

    def texts(self, num_rows: int, *, rng: Rng) -> Iterator[Vectors]:
        """So many texts, as of `images`."""
        yield from self._drawn(num_rows, rng, kind=1, shares=_TEXT_SHARES)

    def _drawn(
        self, num_rows: int, rng: Rng, *, kind: int, shares: tuple[float, ...]
    ) -> Iterator[Vectors]:
        of_all, of_cluster, own = (np.float32(share**0.5) for share in shares)
        for first in range(0, num_rows, _BATCH_ROWS):
            num = min(_BATCH_ROWS, num_rows - first)
            labels = rng.choice(len(self.clusters), num, p=self.shares)
            noise = _directions(num, self.spread, rng)
            vectors = of_all * self.shared[kind] + of_cluster * self.clusters[labels] + own * noise
            yield _unit(vectors @ self.rotation)


def clip_like(*, num_rows: int, embedding_dim: int, seed: int = 0) -> ClipLike:
    """A distribution for so many rows."""
    rng = np.random.default_rng(seed)
    num_clusters = max(16, num_rows // ROWS_PER_CLUSTER)
    spread = (np.arange(1, embedding_dim + 1) ** -_SPECTRUM).astype(np.float32)
    sizes = np.arange(1, num_clusters + 1) ** -_ZIPF
    rotation, _ = np.linalg.qr(rng.standard_normal((embedding_dim, embedding_dim)))
    return ClipLike(
        shared=_directions(2, spread, rng),
        clusters=_directions(num_clusters, spread, rng),
        shares=sizes / sizes.sum(),
        spread=spread,
        rotation=rotation.astype(np.float32),
    )


def _directions(num: int, spread: Vectors, rng: Rng) -> Vectors:
    return _unit(rng.standard_normal((num, len(spread)), dtype=np.float32) * spread)


def _unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)
