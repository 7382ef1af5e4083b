"""Makes one index of one modality of a snapshot: builds or updates it, then measures its recall.

Knows nothing of which of the two is called for, or of what becomes of one that finds too little.
"""

import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.registry import Registry, default_engines_uri
from pipelines import schema
from pipelines.engines import ready_engine
from pipelines.fingerprints import plan_id
from pipelines.indexes import recall
from pipelines.indexes.building import (
    SHARD_ROWS,
    Build,
    build_lists,
    build_rows,
    build_whole,
    draw_queries,
)
from pipelines.indexes.choice import Recipe
from pipelines.indexes.index_files import IndexFiles
from pipelines.indexes.key_hashes import HASHES_FILE
from pipelines.indexes.manifest import (
    FORMAT_VERSION,
    INDEXES_DIR,
    FileRecord,
    IndexManifest,
    index_id_of,
    indexed_files,
)
from pipelines.indexes.opening import (
    LISTS_FILE,
    PLACES_FILE,
    TRUTH_FILE,
    VECTORS_FILE,
    OpenIndex,
    cache_root,
    file_digest,
)
from pipelines.indexes.options import IndexOptions
from pipelines.indexes.row_changes import (
    RowChanges,
    carried_columns,
)
from pipelines.indexes.rows import ROWS_FILE
from pipelines.indexes.shards import ASKED_FILE, FRAME_FILE, SHARDS_DIR, TRAINED_FILE, rows_of
from pipelines.indexes.truth import Truth
from pipelines.indexes.updating import change_rows, update_lists
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot
from pipelines.store import Store

_TEXTS_AT_ONCE = 64
# Names the local folders of a build.
ATTEMPT_FILE = "attempt"

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parent:
    """The index of an earlier snapshot, which keys have their ids from."""

    snapshot: Snapshot
    """Whose it is."""
    index: OpenIndex
    """Opened."""
    changes: RowChanges
    """Since then."""


def make_index(
    store: Store,
    snapshot: Snapshot,
    recipe: Recipe,
    *,
    modality: Modality,
    options: IndexOptions,
    parent: Parent | None,
    is_update: bool = False,
) -> IndexManifest:
    """Build an index, or make it from that before; killed, the same call goes on.

    Args:
        store: Where its embeddings are.
        snapshot: Of one modality of it.
        recipe: What to build.
        modality: Which.
        options: What it shall be.
        parent: The index that keys have their ids from; None: there is none.
        is_update: Whether lists and vectors too are made from the parent's.

    Returns:
        The manifest, with what was measured; not published.

    Raises:
        StoreError: The store cannot be read or written.
    """
    files = tuple(indexed_files(snapshot, modality=modality))
    index_id = index_id_of(snapshot, modality=modality)
    # What its files depend on: a run that was killed goes on with them, another has its own.
    build_id = plan_id(
        [
            str(FORMAT_VERSION),
            recipe.factory,
            str(options.seed),
            str(SHARD_ROWS),
            "update" if is_update else "build",
            *_parent_names(parent),
            *(
                file.path
                for name in snapshot.modalities
                for file in indexed_files(snapshot, modality=name)
            ),
            *map(repr, options.query_texts),
        ]
    )
    folder = f"{INDEXES_DIR}/{index_id}/{build_id}"
    columns = pa.schema([pa.field(schema.KEY, _key_type(snapshot))])
    if files:
        columns = carried_columns(store, files[0])
    build = Build(
        store=store,
        work=IndexFiles(store, folder, cache_dir=_work_dir(store, index_id, build_id)),
        files=files,
        columns=columns,
        embedding_dim=snapshot.embedding_dim,
        recipe=recipe,
        seed=options.seed,
    )
    if TRUTH_FILE not in build.work.names():
        if parent is not None and is_update:
            change_rows(build, parent.index.rows, parent.changes)
            update_lists(build, parent.index, parent.changes)
        else:
            _build(build, snapshot, parent=parent, modality=modality, options=options)
    for name in (SHARDS_DIR, ASKED_FILE, ATTEMPT_FILE):
        build.work.remove(name)
    rows = rows_of(build.work)
    before = parent.index.manifest if parent is not None and is_update else None
    changed = parent.changes.num_all if parent is not None else 0
    manifest = IndexManifest(
        index_id=index_id,
        build_id=build_id,
        engine_id=snapshot.engine.engine_id,
        modality=modality,
        num_rows=rows.num_rows,
        num_ids=rows.num_ids,
        embedding_dim=snapshot.embedding_dim,
        kind=recipe.kind,
        factory=recipe.factory,
        reason=recipe.reason,
        memory_bytes=recipe.memory_bytes,
        setting=before.setting if before else 0,
        min_recall=options.min_recall,
        measured=(),
        num_trained_rows=before.num_trained_rows if before else rows.num_rows,
        num_changed_rows=before.num_changed_rows + changed if before else 0,
        asked=asked_hash(options),
        files=_records(build),
    )
    manifest = _measured(manifest, build, is_update=is_update)
    if not store.is_local:
        shutil.rmtree(build.work.directory, ignore_errors=True)
    return manifest


def asked_hash(options: IndexOptions) -> str:
    """A name for the texts that recall is to be measured with; empty if texts are drawn."""
    return plan_id(list(map(repr, options.query_texts))) if options.query_texts else ""


def _parent_names(parent: Parent | None) -> list[str]:
    """What tells an index from any other, also from one that is built anew in its place."""
    if parent is None:
        return []
    manifest = parent.index.manifest
    digests = sorted(record.xxh3_128 for record in manifest.files.values())
    return [manifest.index_id, manifest.build_id, *digests]


def _work_dir(store: Store, index_id: str, build_id: str) -> Path:
    """Where files of a store that is not on a disk are written, before they go there.

    A folder of its own for each attempt from the start: what another left on this node is of no
    use, since nobody knows what it was made from.
    """
    attempt = f"{INDEXES_DIR}/{index_id}/{build_id}/{ATTEMPT_FILE}"
    if store.is_local:
        return Path()
    name = store.read_if_there(attempt)
    if name is None:
        name = uuid.uuid4().hex.encode()
        store.publish(attempt, name)
    return cache_root(store) / "building" / name.decode()


def _build(
    build: Build,
    snapshot: Snapshot,
    *,
    parent: Parent | None,
    modality: Modality,
    options: IndexOptions,
) -> None:
    if parent is None:
        build_rows(build)
    else:
        change_rows(build, parent.index.rows, parent.changes)
    if ASKED_FILE not in build.work.names():
        truth = draw_queries(
            build,
            modality=modality,
            files={name: indexed_files(snapshot, modality=name) for name in snapshot.modalities},
            own_queries=_own_queries(snapshot, options) if options.query_texts else None,
        )
        build.work.write(ASKED_FILE, truth.to_bytes())
    fill = build_lists if build.recipe.kind == "ivf" else build_whole
    fill(build, are_ids_positions=parent is None)


def _own_queries(snapshot: Snapshot, options: IndexOptions) -> Vectors:
    registry = Registry(options.engines_uri or default_engines_uri())
    engine = ready_engine(snapshot.engine, registry=registry)
    encoder = OnnxCpuEncoder(engine.directory, num_threads=len(os.sched_getaffinity(0)))
    texts = options.query_texts
    parts = [
        encoder.encode_texts(texts[first : first + _TEXTS_AT_ONCE])
        for first in range(0, len(texts), _TEXTS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _measured(manifest: IndexManifest, build: Build, *, is_update: bool) -> IndexManifest:
    index = OpenIndex(manifest, build.work.directory)
    truth = Truth.from_bytes(build.work.local(TRUTH_FILE).read_bytes())
    measured = recall.measure_curve(
        index,
        truth,
        min_recall=manifest.min_recall,
        least_setting=manifest.setting if is_update else 0,
        max_beyond=0 if is_update else recall.NUM_BEYOND,
    )
    setting = recall.chosen_setting(measured, min_recall=manifest.min_recall)
    return replace(manifest, measured=tuple(measured), setting=setting)


def _records(build: Build) -> dict[str, FileRecord]:
    names = [ROWS_FILE, HASHES_FILE, TRAINED_FILE, TRUTH_FILE]
    if build.recipe.kind == "ivf":
        names += [FRAME_FILE, LISTS_FILE, VECTORS_FILE if build.recipe.is_reranked else PLACES_FILE]
    elif build.recipe.kind == "hnsw":
        names.append(PLACES_FILE)
    paths = {name: build.work.local(name) for name in names}
    return {
        name: FileRecord(num_bytes=path.stat().st_size, xxh3_128=file_digest(path))
        for name, path in paths.items()
    }


def _key_type(snapshot: Snapshot) -> pa.DataType:
    return pa.int64() if snapshot.key_type == "int64" else pa.string()
