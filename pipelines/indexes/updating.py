"""Makes an index of another snapshot from that of an earlier one: what differs goes and comes.

Knows nothing of when that is no longer worth it. Only inverted lists are changed so: exact indexes
and graphs are small, and built anew.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Thread

import faiss
import numpy as np
from numpy.typing import NDArray

from pipelines import schema
from pipelines.guarding.stored_samples import vectors_of
from pipelines.indexes.bitmaps import Bitmap, bitmap_of
from pipelines.indexes.building import (
    Build,
    merge_parts,
    publish_rows,
    write_places,
)
from pipelines.indexes.key_hashes import HASHES_FILE
from pipelines.indexes.lists import Lists, lists_of, write_lists
from pipelines.indexes.opening import LISTS_FILE, TRUTH_FILE, VECTORS_FILE, OpenIndex
from pipelines.indexes.row_changes import RowChanges, read_coming
from pipelines.indexes.row_writing import update_rows
from pipelines.indexes.rows import RowTable
from pipelines.indexes.shards import FRAME_FILE, SHARDS_DIR, TRAINED_FILE, read_placed, rows_of
from pipelines.indexes.truth import Truth
from pipelines.indexes.vector_file import resize_vectors, write_at_ids
from pipelines.snapshots import Snapshot

_PART_FILE = f"{SHARDS_DIR}/update.ivf"

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parent:
    """The index of an earlier snapshot, which keys have their ids from."""

    snapshot: Snapshot
    """Whose it is."""
    index: OpenIndex
    """Opened."""
    changes: RowChanges
    """Since then."""


def change_rows(build: Build, parent: RowTable, changes: RowChanges) -> None:
    """Write the rows of an index whose keys keep the ids that they have in another.

    Raises:
        StoreError: A file cannot be read or written.
    """
    if HASHES_FILE in build.work.names():
        return
    build.work.create()
    coming = read_coming(build.store, changes, without=(schema.EMBEDDING,))
    if coming is None:
        coming = build.columns.empty_table()
    update_rows(
        build.work.directory,
        parent=parent,
        removed_ids=changes.removed_ids,
        added=coming.select(build.columns.names),
    )
    publish_rows(build.work)


def update_lists(build: Build, parent: OpenIndex, changes: RowChanges) -> None:
    """Write lists, vectors and queries' answers of an index whose rows are written.

    Raises:
        StoreError: A file cannot be read or written.
    """
    work = build.work
    rows = rows_of(work)
    coming = read_coming(build.store, changes)
    ids = np.zeros(0, dtype=np.int64)
    vectors = np.zeros((0, build.embedding_dim), dtype=np.float32)
    if coming is not None:
        ids, vectors = rows.ids_of(coming[schema.KEY].combine_chunks()), vectors_of(coming)
    gone = bitmap_of(
        np.concatenate([changes.removed_ids, ids]), num_ids=max(rows.num_ids, parent.rows.num_ids)
    )
    # A third of an update of 1 %, and nothing but copying.
    copied = _begun(
        partial(_change_vectors, build, parent, num_ids=rows.num_ids, vectors=vectors, ids=ids)
    )
    _change_lists(build, parent, gone=gone, vectors=vectors, ids=ids)
    if not build.recipe.is_reranked:
        write_places(work, num_ids=rows.num_ids)
    work.write(FRAME_FILE, (parent.directory / FRAME_FILE).read_bytes())
    work.write(TRAINED_FILE, (parent.directory / TRAINED_FILE).read_bytes())
    truth = _changed_truth(build, parent, gone=gone, vectors=vectors, ids=ids)
    copied.result()
    work.write(TRUTH_FILE, truth.to_bytes())


def _begun(work: Callable[[], None]) -> Future[None]:
    """In a thread that nobody waits for who is told to end, unlike those of an executor."""
    begun: Future[None] = Future()

    def do() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001, raised where the result is asked for
            begun.set_exception(error)
        else:
            begun.set_result(None)

    Thread(target=do, name="update", daemon=True).start()
    return begun


def _change_lists(
    build: Build, parent: OpenIndex, *, gone: Bitmap, vectors: Vectors, ids: Ids
) -> None:
    work = build.work
    if LISTS_FILE not in work.names():
        added = faiss.read_index(str(parent.directory / TRAINED_FILE))
        added.add_with_ids(parent.frame.of_rows(vectors), ids)
        with work.writing(_PART_FILE) as path:
            write_lists(path, lists_of(added), code_size=added.code_size)
        parts = [Lists(parent.directory / LISTS_FILE), Lists(work.local(_PART_FILE))]
        merge_parts(work, parts, removed=gone)


def _change_vectors(
    build: Build, parent: OpenIndex, *, num_ids: int, vectors: Vectors, ids: Ids
) -> None:
    """Write those that answers are re-ranked by, if they are."""
    work = build.work
    if build.recipe.is_reranked and VECTORS_FILE not in work.names():
        with work.writing(VECTORS_FILE) as path:
            shutil.copyfile(parent.directory / VECTORS_FILE, path)
            first_byte = resize_vectors(path, num_ids=num_ids, dim=build.embedding_dim)
            write_at_ids(path, [(vectors, ids)], first_byte=first_byte)


def _changed_truth(
    build: Build,
    parent: OpenIndex,
    *,
    gone: Bitmap,
    vectors: Vectors,
    ids: Ids,
) -> Truth:
    before = Truth.from_bytes((parent.directory / TRUTH_FILE).read_bytes()).without(gone)
    truth = before.with_rows(vectors, ids)
    if truth.is_deep_enough(build.num_rows):
        return truth
    truth = before.unanswered_again()
    for part, part_ids in read_placed(build.store, build.work, build.files, first_ids=None):
        truth = truth.with_rows(part, part_ids)
    return truth
