"""Draws rows across all files of a snapshot, and trains an index on them: frame, centroids, codes.

Knows nothing of how rows are added.
"""

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipelines import schema
from pipelines.arrow_files import open_parquet
from pipelines.guarding.stored_samples import vectors_of
from pipelines.indexes.choice import Recipe
from pipelines.indexes.frame import Frame, random_rotation
from pipelines.snapshots import StoredFile
from pipelines.store import Store

# Of the sample, for each list: k-means of FAISS wants 39 at least, and gains little from more.
POINTS_PER_LIST = 40
MIN_SAMPLE_ROWS = 20_000
ITERATIONS = 8
_PART_ROWS = 16_384

Vectors = NDArray[np.float32]


def draw_vectors(
    store: Store,
    files: Sequence[StoredFile],
    *,
    num_wanted: int,
    embedding_dim: int,
    seed: int,
) -> Vectors:
    """Embeddings float32 [N, D] of rows drawn across all files, each as likely as any other.

    Of a file with several row groups as many are read as it takes, drawn by lot.

    Raises:
        StoreError: A file cannot be read.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([file.num_rows for file in files], dtype=np.int64)
    num_wanted = min(num_wanted, int(sizes.sum()))
    drawn = np.empty((num_wanted, embedding_dim), dtype=np.float32)
    first = 0
    # Of rows that are drawn with replacement, which of so many is nearly the same.
    of_files = np.minimum(rng.multinomial(num_wanted, sizes / max(sizes.sum(), 1)), sizes)
    for file, num in zip(files, sizes if num_wanted == sizes.sum() else of_files, strict=True):
        if num:
            drawn[first : first + num] = _drawn(store, file, num_wanted=int(num), rng=rng)
            first += num
    return drawn[:first]


def _drawn(store: Store, file: StoredFile, *, num_wanted: int, rng: np.random.Generator) -> Vectors:
    with store.open(file.path) as opened:
        parquet = open_parquet(opened)
        groups = rng.permutation(parquet.num_row_groups)
        sizes = [parquet.metadata.row_group(int(group)).num_rows for group in groups]
        num_groups = int(np.searchsorted(np.cumsum(sizes), num_wanted)) + 1
        table = parquet.read_row_groups(
            [int(group) for group in groups[:num_groups]], [schema.EMBEDDING]
        )
    drawn = np.sort(rng.permutation(table.num_rows)[:num_wanted])
    return vectors_of(table.take(drawn))


def num_sample_rows(recipe: Recipe) -> int:
    """Rows that training wants."""
    return max(POINTS_PER_LIST * recipe.num_lists, MIN_SAMPLE_ROWS)


def train(recipe: Recipe, sample: Vectors, *, seed: int) -> tuple[Frame, Any]:
    """Train an index of inverted lists.

    Args:
        recipe: Of kind ivf.
        sample: float32 [N, D], unit norm; used up.
        seed: Of clusters and rotation: the same sample and threads give the same index.

    Returns:
        The frame that its vectors are to be in, and the FAISS index, empty.
    """
    embedding_dim = sample.shape[1]
    mean = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    rotation = random_rotation(embedding_dim, seed=seed) if recipe.is_rotated else None
    # In place, part by part: the sample is the most that training holds.
    unscaled = Frame(mean=mean, scale=1.0, rotation=rotation)
    for first in range(0, len(sample), _PART_ROWS):
        part = sample[first : first + _PART_ROWS]
        part[:] = unscaled.of_rows(part)
    lengths = np.sqrt(np.einsum("nd,nd->n", sample, sample))[:, None] + np.float32(1e-12)
    sample /= lengths
    centroids = _centroids(sample, num_lists=recipe.num_lists, seed=seed)
    sample *= lengths
    # A row's list is that whose centroid it points to; as long as it, on average, it shall be.
    products, _ = faiss.knn(sample, centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)
    scale = 1 / max(float(products.mean()), 1e-6)
    sample *= np.float32(scale)
    index = faiss.index_factory(
        embedding_dim, recipe.factory.removesuffix(",Refine(SQfp16)"), faiss.METRIC_INNER_PRODUCT
    )
    index.quantizer.add(centroids)
    index.train(sample)
    return Frame(mean=mean, scale=scale, rotation=rotation), index


def _centroids(directions: Vectors, *, num_lists: int, seed: int) -> Vectors:
    """Unit centroids float32 [num_lists, D] of directions float32 [N, D]."""
    num_rows, embedding_dim = directions.shape
    kmeans = faiss.Kmeans(
        embedding_dim,
        num_lists,
        niter=ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=max(num_rows, 1),
    )
    if num_rows < num_lists:  # more lists were asked for by name than there are rows
        more = np.random.default_rng(seed).standard_normal((num_lists - num_rows, embedding_dim))
        more /= np.linalg.norm(more, axis=1, keepdims=True)
        directions = np.concatenate([directions, more.astype(np.float32)])
    kmeans.train(directions)
    return np.asarray(kmeans.centroids, dtype=np.float32).reshape(num_lists, -1)
