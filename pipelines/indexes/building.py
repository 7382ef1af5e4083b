"""Builds an index of a snapshot's embeddings from nothing but them: trains, divides, merges.

Knows nothing of what becomes of an index whose recall is too low. Killed at any point, the same
call goes on with the files that are whole; when that of the queries' answers is there, all are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from pipelines.cluster.cluster_state import wait_for_place
from pipelines.cluster.placement import Placement, WorkerDemand
from pipelines.cluster.worker_logs import redact_worker
from pipelines.indexes.array_files import resize_array
from pipelines.indexes.bitmaps import Bitmap
from pipelines.indexes.choice import Recipe
from pipelines.indexes.index_files import IndexFiles
from pipelines.indexes.key_hashes import HASHES_FILE
from pipelines.indexes.lists import Lists, merged_lists, write_lists
from pipelines.indexes.manifest import indexed_files
from pipelines.indexes.opening import LISTS_FILE, PLACES_FILE, TRUTH_FILE, VECTORS_FILE
from pipelines.indexes.options import IndexOptions
from pipelines.indexes.row_writing import write_rows
from pipelines.indexes.rows import ROWS_FILE
from pipelines.indexes.shards import (
    ASKED_FILE,
    FRAME_FILE,
    SHARDS_DIR,
    TRAINED_FILE,
    Shard,
    build_shard,
    read_placed,
    rows_of,
    shards_of,
)
from pipelines.indexes.training import draw_vectors, num_sample_rows, train
from pipelines.indexes.truth import Truth
from pipelines.indexes.vector_file import resize_vectors, write_at_ids
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot, StoredFile
from pipelines.store import Store
from pipelines.stored_rows import read_stored

# Enough for a task of a minute, and few enough that a machine's memory holds many.
SHARD_ROWS = 500_000

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """One index that is being built."""

    store: Store
    """Of the embeddings."""
    snapshot: Snapshot
    """Whose they are."""
    modality: Modality
    """Of them."""
    options: IndexOptions
    """What the index shall be."""
    recipe: Recipe
    """What to build."""
    build_id: str
    """Names the folder of its files."""
    work: IndexFiles
    """Where they go."""
    columns: pa.Schema
    """Key and carried columns of the rows."""
    first_ids: tuple[int, ...] | None
    """The id of each file's first row, the others follow; None: ids are a parent's, had by key."""

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Of the embeddings, in the order of their rows."""
        return tuple(indexed_files(self.snapshot, modality=self.modality))

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.snapshot.embedding_dim

    @property
    def num_rows(self) -> int:
        """Of all files."""
        return sum(file.num_rows for file in self.files)


def build_rows(build: Build) -> None:
    """Write the rows of an index that has no parent: ids are positions."""
    if HASHES_FILE in build.work.names():
        return
    build.work.create()
    names = build.columns.names
    tables = (table for _, table in read_stored(build.store, build.files, columns=names))
    write_rows(build.work.directory, tables, columns=build.columns)
    publish_rows(build.work)


def publish_rows(work: IndexFiles) -> None:
    """Bring the rows that were written into the store, the file that tells of both last."""
    work.publish(ROWS_FILE)
    work.publish(HASHES_FILE)


def build_lists(build: Build) -> None:
    """Train, build shards (as Ray tasks where Ray runs) and merge them.

    The rows and the queries that are asked are there.

    Raises:
        StoreError: A file cannot be read or written.
    """
    work, recipe = build.work, build.recipe
    if TRAINED_FILE not in work.names():
        sample = draw_vectors(
            build.store,
            build.files,
            num_wanted=num_sample_rows(recipe),
            embedding_dim=build.embedding_dim,
            seed=build.options.seed,
        )
        frame, index = train(recipe, sample, seed=build.options.seed)
        del sample
        work.write(FRAME_FILE, frame.to_bytes())
        _write_index(work, index)
    shards = shards_of(build.files, first_ids=build.first_ids, max_rows=SHARD_ROWS)
    _build_shards(build, shards)
    merge_parts(work, [Lists(work.local(shard.lists_file)) for shard in shards])
    num_ids = rows_of(work).num_ids
    if recipe.is_reranked:
        write_vectors(work, _placed(build), num_ids=num_ids, dim=build.embedding_dim)
    else:
        write_places(work, num_ids=num_ids)
    truth = Truth.from_bytes(work.local(ASKED_FILE).read_bytes())
    for shard in shards:
        truth = truth.merged(Truth.from_bytes(work.local(shard.truth_file).read_bytes()))
    work.write(TRUTH_FILE, truth.to_bytes())


def merge_parts(work: IndexFiles, parts: Sequence[Lists], *, removed: Bitmap | None = None) -> None:
    """Merge lists into those of the index, the first less some ids; kept if they are there."""
    if LISTS_FILE not in work.names():
        with work.writing(LISTS_FILE) as path:
            write_lists(path, merged_lists(parts, removed=removed), code_size=parts[0].code_size)


def write_places(work: IndexFiles, *, num_ids: int) -> None:
    """Write where in the lists each id is: list * 2^32 + position."""
    if PLACES_FILE in work.names():
        return
    lists = Lists(work.local(LISTS_FILE))
    with work.writing(PLACES_FILE) as path:
        resize_array(path, descr="<i8", shape=(num_ids,))
        places = np.load(path, mmap_mode="r+")
        for number in range(len(lists.sizes)):
            ids = lists.ids(number)
            places[ids] = number * 2**32 + np.arange(len(ids))
        places.flush()


def write_vectors(
    work: IndexFiles, placed: Iterator[tuple[Vectors, Ids]], *, num_ids: int, dim: int
) -> None:
    """Write vectors by id, as 16-bit floats."""
    if VECTORS_FILE in work.names():
        return
    with work.writing(VECTORS_FILE) as path:
        write_at_ids(path, placed, first_byte=resize_vectors(path, num_ids=num_ids, dim=dim))


def build_whole(build: Build) -> None:
    """Build an index that is held in memory: an exact one, or a graph.

    Raises:
        StoreError: A file cannot be read or written.
    """
    work = build.work
    num_ids = rows_of(work).num_ids
    truth = Truth.from_bytes(work.local(ASKED_FILE).read_bytes())
    vectors = np.zeros((num_ids, build.embedding_dim), dtype=np.float32)
    is_used = np.zeros(num_ids, dtype=np.bool_)
    for part, ids in _placed(build):
        vectors[ids], is_used[ids] = part, True
        truth = truth.with_rows(part, ids)
    index = faiss.index_factory(
        build.embedding_dim, build.recipe.factory, faiss.METRIC_INNER_PRODUCT
    )
    if build.recipe.kind == "hnsw":
        graph_ids = np.flatnonzero(is_used)
        vectors = vectors[graph_ids]
        index.train(vectors)
        with work.writing(PLACES_FILE) as path, path.open("wb") as file:
            np.save(file, graph_ids)
    index.add(vectors)
    _write_index(work, index)
    work.write(TRUTH_FILE, truth.to_bytes())


def _build_shards(build: Build, shards: Sequence[Shard]) -> None:
    done = set(build.work.names_in(SHARDS_DIR))
    left = [shard for shard in shards if Path(shard.truth_file).name not in done]
    if len(left) > 1 and ray.is_initialized():
        task = cast("Any", ray.remote)(num_cpus=1)(_build_shard)
        built = [task.remote(shard, store=build.store, work=build.work) for shard in left]
        building = WorkerDemand(
            what="building a shard of the index",
            resources={"CPU": 1.0},
            kind="queue",
            option=None,
        )
        wait_for_place(built, wanted=building, placement=Placement(fail_seconds=math.inf))
        ray.get(built)
        return
    for shard in left:
        build_shard(shard, store=build.store, work=build.work)


def _build_shard(shard: Shard, *, store: Store, work: IndexFiles) -> None:
    redact_worker()
    build_shard(shard, store=store, work=work)


def _placed(build: Build) -> Iterator[tuple[Vectors, Ids]]:
    """All vectors and their ids, a few at a time."""
    return read_placed(build.store, build.work, build.files, first_ids=build.first_ids)


def _write_index(work: IndexFiles, index: Any) -> None:
    with work.writing(TRAINED_FILE) as path:
        try:
            faiss.write_index(index, str(path))
        except RuntimeError as error:  # what FAISS makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error
