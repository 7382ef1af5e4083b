"""One shard of an index: some files' vectors as codes in lists, and what queries find in them.

Knows nothing of how shards are merged. A shard is two files, the second written last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines import schema
from pipelines.arrow_files import open_parquet
from pipelines.guarding.stored_samples import vectors_of
from pipelines.indexes.frame import Frame
from pipelines.indexes.index_files import IndexFiles
from pipelines.indexes.key_hashes import HASHES_FILE
from pipelines.indexes.lists import lists_of, write_lists
from pipelines.indexes.rows import ROWS_FILE, RowTable
from pipelines.indexes.truth import Truth
from pipelines.snapshots import StoredFile
from pipelines.store import Store

SHARDS_DIR = "shards"
TRAINED_FILE, FRAME_FILE = "index.faiss", "frame.npz"
# Without answers, which shards find.
ASKED_FILE = "asked.npz"

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What a shard is made of."""

    number: int
    """Counts from 0."""
    files: tuple[StoredFile, ...]
    """Whose rows are in it."""
    first_ids: tuple[int, ...] | None
    """The id of each file's first row, the others follow; None: ids are looked up by key."""

    @property
    def lists_file(self) -> str:
        """Its lists."""
        return f"{SHARDS_DIR}/{self.number:05d}.ivf"

    @property
    def truth_file(self) -> str:
        """What queries find in it; there when the shard is whole."""
        return f"{SHARDS_DIR}/{self.number:05d}.npz"


def shards_of(
    files: Sequence[StoredFile], *, first_ids: Sequence[int] | None, max_rows: int
) -> list[Shard]:
    """Divide files among shards of about so many rows."""
    groups: list[list[int]] = []
    num_rows = 0
    for place, file in enumerate(files):
        if not groups or num_rows + file.num_rows > max_rows:
            groups.append([])
            num_rows = 0
        groups[-1].append(place)
        num_rows += file.num_rows
    return [
        Shard(
            number=number,
            files=tuple(files[place] for place in group),
            first_ids=None if first_ids is None else tuple(first_ids[place] for place in group),
        )
        for number, group in enumerate(groups)
    ]


def build_shard(shard: Shard, *, store: Store, work: IndexFiles) -> None:
    """Write a shard; one that is there is kept.

    Args:
        shard: Which.
        store: Where its embeddings are.
        work: Where the trained index, its frame, the queries, and the rows are.

    Raises:
        StoreError: A file cannot be read or written.
    """
    frame = Frame.from_bytes(work.local(FRAME_FILE).read_bytes())
    truth = Truth.from_bytes(work.local(ASKED_FILE).read_bytes())
    index = faiss.read_index(str(work.local(TRAINED_FILE)))
    for vectors, ids in read_placed(store, work, shard.files, first_ids=shard.first_ids):
        index.add_with_ids(frame.of_rows(vectors), ids)
        truth = truth.with_rows(vectors, ids)
    with work.writing(shard.lists_file) as path:
        write_lists(path, lists_of(index), code_size=index.code_size)
    work.write(shard.truth_file, truth.to_bytes())


def rows_of(work: IndexFiles) -> RowTable:
    """The rows of an index that is being built; StoreError if they cannot be read."""
    for name in (ROWS_FILE, HASHES_FILE):
        work.local(name)
    return RowTable(work.directory)


def read_placed(
    store: Store,
    work: IndexFiles,
    files: Sequence[StoredFile],
    *,
    first_ids: Sequence[int] | None,
) -> Iterator[tuple[Vectors, Ids]]:
    """Embeddings float32 [N, D] of files and their ids int64 [N], a few row groups at once.

    Args:
        store: Of the embeddings.
        work: Where the rows of the index are.
        files: Which.
        first_ids: The id of each file's first row, the others follow; None: ids are looked up by
            key.

    Raises:
        StoreError: A file cannot be read.
    """
    if first_ids is None:
        rows = rows_of(work)
        for file in files:
            for keys, vectors in read_vectors(store, file):
                yield vectors, rows.ids_of(keys)
        return
    for file, next_id in zip(files, first_ids, strict=True):
        for _, vectors in read_vectors(store, file):
            yield vectors, np.arange(next_id, next_id + len(vectors))
            next_id += len(vectors)


def read_vectors(store: Store, file: StoredFile) -> Iterator[tuple[pa.Array, Vectors]]:
    """Keys [N] and embeddings float32 [N, D] of a file, a few row groups at once."""
    with store.open(file.path) as opened:
        for batch in open_parquet(opened).iter_batches(
            16_384, columns=[schema.KEY, schema.EMBEDDING]
        ):
            table = pa.Table.from_batches([batch])
            yield table[schema.KEY].combine_chunks(), vectors_of(table)
