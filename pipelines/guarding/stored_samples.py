"""Draws a few embeddings of a snapshot, seeded, from a few of its files.

Knows nothing of what they are compared with.

Which files are drawn depends on their paths and sizes alone: of two snapshots that share files,
mostly the same rows are drawn, so that chance does not make them differ.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from pipelines import schema
from pipelines.arrow_files import open_parquet
from pipelines.snapshots import StoredFile
from pipelines.store import Store

MAX_ROWS = 4096
MAX_FILES = 16
SEED = 0

# (so many rows, of so many, rng) -> their positions, ascending.
_Choose = Callable[[int, int, np.random.Generator], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSample:
    """Some embeddings and their keys."""

    keys: pa.Array
    """[N], string or int64."""
    vectors: NDArray[np.float32]
    """float32 [N, D], as they are stored: of unit norm, if nothing is wrong."""


def draw_sample(store: Store, files: Sequence[StoredFile]) -> StoredSample | None:
    """Draw at most 4,096 rows of at most 16 files of embeddings, each row as likely as any other.

    Of a file with several row groups one is read. None if there are no rows. What has no more rows
    and files than that is read whole.
    """
    parts = [
        _rows(store, file, num_rows=num_rows, choose=_scattered)
        for file, num_rows in _drawn_files(files)
    ]
    return _joined(parts)


def draw_pairs(
    store: Store, before: Sequence[StoredFile], after: Sequence[StoredFile]
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Draw keys that two snapshots have, with their embeddings in both.

    At most 4,096 rows of at most 16 files are drawn from the first. In the second, keys alone are
    read, file by file, until all of these are found; embeddings of files in which some are.

    Args:
        store: Of both.
        before: Files of embeddings of one.
        after: Of the other, of the same modality.

    Returns:
        float32 [N, D] and float32 [N, E] of the same keys; None if there are none.
    """
    parts = [
        # Neighbours in the catalog, which mostly lie together in the second snapshot too.
        _rows(store, file, num_rows=num_rows, choose=_neighbours)
        for file, num_rows in _drawn_files(before)
    ]
    sample = _joined(parts)
    if sample is None:
        return None
    places: list[NDArray[np.int64]] = []
    found: list[NDArray[np.float32]] = []
    num_left = len(sample.keys)
    for file in after:
        if not num_left:
            break
        with store.open(file.path) as opened:
            table = open_parquet(opened)
            of_row = pc.index_in(table.read([schema.KEY])[schema.KEY], value_set=sample.keys)
            positions = np.flatnonzero(of_row.is_valid().to_numpy())
            if len(positions):
                vectors = vectors_of(table.read([schema.EMBEDDING]).take(positions))
                places.append(of_row.take(positions).to_numpy().astype(np.int64))
                found.append(vectors)
                num_left -= len(positions)
    if not places:
        return None
    return sample.vectors[np.concatenate(places)], np.concatenate(found)


def _drawn_files(files: Sequence[StoredFile]) -> list[tuple[StoredFile, int]]:
    """Files and how many rows of each are to be drawn; all of all, where that is little."""
    files = sorted((file for file in files if file.num_rows), key=lambda file: file.path)
    sizes = np.array([file.num_rows for file in files])
    if len(files) <= MAX_FILES and sizes.sum() <= MAX_ROWS:
        return [(file, file.num_rows) for file in files]
    # Of exponential times with rates as the sizes, a file's is the first with the probability of
    # its share of the rows.
    hashes = np.array(
        [
            [xxhash.xxh3_64_intdigest(f"{draw} {file.path}".encode(), seed=SEED) for file in files]
            for draw in range(MAX_FILES)
        ],
        dtype=np.float64,
    )
    times = -np.log((hashes + 1) / 2.0**64) / sizes
    num_drawn = Counter(times.argmin(axis=1).tolist())
    return [(files[place], num * (MAX_ROWS // MAX_FILES)) for place, num in num_drawn.items()]


def _scattered(num_rows: int, of_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.sort(rng.permutation(of_rows)[:num_rows])


def _neighbours(num_rows: int, of_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.arange(num_rows) + rng.integers(of_rows - num_rows + 1)


def _rows(store: Store, file: StoredFile, *, num_rows: int, choose: _Choose) -> StoredSample:
    rng = np.random.default_rng(xxhash.xxh3_64_intdigest(file.path.encode(), seed=SEED))
    with store.open(file.path) as opened:
        parquet = open_parquet(opened)
        sizes = [
            parquet.metadata.row_group(group).num_rows
            for group in range(parquet.metadata.num_row_groups)
        ]
        columns = [schema.KEY, schema.EMBEDDING]
        if num_rows >= file.num_rows:
            table = parquet.read(columns)
        else:
            group = rng.choice(len(sizes), p=np.array(sizes) / sum(sizes))
            table = parquet.read_row_group(int(group), columns)
    table = table.take(choose(min(num_rows, table.num_rows), table.num_rows, rng))
    return StoredSample(keys=table[schema.KEY].combine_chunks(), vectors=vectors_of(table))


def vectors_of(table: pa.Table) -> NDArray[np.float32]:
    """The column of embeddings as float32 [N, D]."""
    column = table[schema.EMBEDDING].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _joined(parts: Sequence[StoredSample]) -> StoredSample | None:
    if not parts:
        return None
    return StoredSample(
        keys=pa.concat_arrays([part.keys for part in parts]),
        vectors=np.concatenate([part.vectors for part in parts]),
    )
