"""Makes one index of one modality of a snapshot: builds or updates it, then measures its recall.

Knows nothing of which of the two is called for, or of what becomes of one that finds too little.
"""

import shutil
import uuid
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pipelines import schema
from pipelines.fingerprints import plan_id
from pipelines.indexes import recall
from pipelines.indexes.asked_queries import asked_hash, draw_queries
from pipelines.indexes.building import SHARD_ROWS, Build, build_lists, build_rows, build_whole
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
from pipelines.indexes.row_changes import carried_columns
from pipelines.indexes.rows import ROWS_FILE
from pipelines.indexes.shards import ASKED_FILE, FRAME_FILE, SHARDS_DIR, TRAINED_FILE, rows_of
from pipelines.indexes.truth import Truth
from pipelines.indexes.updating import Parent, change_rows, update_lists
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot
from pipelines.store import Store

# Names the local folders of a build.
ATTEMPT_FILE = "attempt"


def make_index(
    store: Store,
    snapshot: Snapshot,
    recipe: Recipe,
    *,
    modality: Modality,
    options: IndexOptions,
    parent: Parent | None,
) -> IndexManifest:
    """Build an index; killed, the same call goes on.

    Args:
        store: Where its embeddings are.
        snapshot: Of one modality of it.
        recipe: What to build.
        modality: Which.
        options: What it shall be.
        parent: The index that keys have their ids from; None: there is none.

    Returns:
        The manifest, with what was measured; not published.

    Raises:
        StoreError: The store cannot be read or written.
    """
    build = _begun(store, snapshot, recipe, "build", modality, options, parent)
    if TRUTH_FILE not in build.work.names():
        if parent is None:
            build_rows(build)
        else:
            change_rows(build, parent.index.rows, parent.changes)
        if ASKED_FILE not in build.work.names():
            build.work.write(ASKED_FILE, draw_queries(build).to_bytes())
        fill = build_lists if recipe.kind == "ivf" else build_whole
        fill(build)
    return _measured(build, _manifest(build), max_beyond=recall.NUM_BEYOND)


def update_index(
    store: Store,
    snapshot: Snapshot,
    recipe: Recipe,
    *,
    modality: Modality,
    options: IndexOptions,
    parent: Parent,
) -> IndexManifest:
    """The same, with lists and vectors too made from those of the parent, and queries as it had.

    Raises:
        StoreError: The store cannot be read or written.
    """
    build = _begun(store, snapshot, recipe, "update", modality, options, parent)
    if TRUTH_FILE not in build.work.names():
        change_rows(build, parent.index.rows, parent.changes)
        update_lists(build, parent.index, parent.changes)
    before = parent.index.manifest
    manifest = replace(
        _manifest(build),
        setting=before.setting,
        num_trained_rows=before.num_trained_rows,
        num_changed_rows=before.num_changed_rows + parent.changes.num_all,
    )
    return _measured(build, manifest, max_beyond=0)


def _begun(
    store: Store,
    snapshot: Snapshot,
    recipe: Recipe,
    how: Literal["build", "update"],
    modality: Modality,
    options: IndexOptions,
    parent: Parent | None,
) -> Build:
    index_id = index_id_of(snapshot, modality=modality)
    # What its files depend on: a run that was killed goes on with them, another has its own.
    build_id = plan_id(
        [
            str(FORMAT_VERSION),
            recipe.factory,
            str(options.seed),
            str(SHARD_ROWS),
            how,
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
    files = indexed_files(snapshot, modality=modality)
    columns = pa.schema([pa.field(schema.KEY, _key_type(snapshot))])
    if files:
        columns = carried_columns(store, files[0])
    num_rows = [file.num_rows for file in files]
    return Build(
        store=store,
        snapshot=snapshot,
        modality=modality,
        options=options,
        recipe=recipe,
        build_id=build_id,
        work=IndexFiles(store, folder, cache_dir=_work_dir(store, index_id, build_id)),
        columns=columns,
        first_ids=(0, *accumulate(num_rows))[: len(files)] if parent is None else None,
    )


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


def _manifest(build: Build) -> IndexManifest:
    """Of an index whose files are whole, as if it was trained on its rows."""
    for name in (SHARDS_DIR, ASKED_FILE, ATTEMPT_FILE):
        build.work.remove(name)
    rows, recipe = rows_of(build.work), build.recipe
    return IndexManifest(
        index_id=index_id_of(build.snapshot, modality=build.modality),
        build_id=build.build_id,
        engine_id=build.snapshot.engine.engine_id,
        modality=build.modality,
        num_rows=rows.num_rows,
        num_ids=rows.num_ids,
        embedding_dim=build.embedding_dim,
        kind=recipe.kind,
        factory=recipe.factory,
        reason=recipe.reason,
        memory_bytes=recipe.memory_bytes,
        setting=0,
        min_recall=build.options.min_recall,
        measured=(),
        num_trained_rows=rows.num_rows,
        num_changed_rows=0,
        asked=asked_hash(build.options),
        files=_records(build),
    )


def _measured(build: Build, manifest: IndexManifest, *, max_beyond: int) -> IndexManifest:
    index = OpenIndex(manifest, build.work.directory)
    truth = Truth.from_bytes(build.work.local(TRUTH_FILE).read_bytes())
    measured = recall.measure_curve(
        index,
        truth,
        min_recall=manifest.min_recall,
        least_setting=manifest.setting,
        max_beyond=max_beyond,
    )
    setting = recall.chosen_setting(measured, min_recall=manifest.min_recall)
    if not build.store.is_local:
        shutil.rmtree(build.work.directory, ignore_errors=True)
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
