"""Tests of pipelines/indexes/shards.py, building.py and training.py: parts, interrupted, on Ray."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from pipelines.indexes import building, shards
from pipelines.indexes.index_files import IndexFiles
from pipelines.indexes.manifest import IndexManifest
from pipelines.indexes.opening import open_build
from pipelines.indexes.options import IndexOptions
from pipelines.indexes.training import draw_vectors
from pipelines.indexing import check_recall, index_snapshot
from pipelines.snapshots import Snapshot
from pipelines.store import Store
from tests.stored import embeddings_file, make_snapshot

DIM, NUM_FILES, ROWS_PER_FILE = 8, 6, 100
OPTIONS = IndexOptions(factory="IVF16,SQ8", min_recall=0.8)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(building, "SHARD_ROWS", 2 * ROWS_PER_FILE)
    # One that other tests started would build them.
    monkeypatch.setattr(building, "ray", SimpleNamespace(is_initialized=lambda: False))


def snapshot_of(store: Store) -> Snapshot:
    vectors = np.random.default_rng(0).normal(size=(NUM_FILES * ROWS_PER_FILE, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    files = [
        embeddings_file(
            store,
            {f"k{row}": vectors[row] for row in range(first, first + ROWS_PER_FILE)},
        )
        for first in range(0, len(vectors), ROWS_PER_FILE)
    ]
    return make_snapshot(files, embedding_dim=DIM)


def built(store: Store, snapshot: Snapshot) -> IndexManifest:
    (manifest,) = index_snapshot(store, snapshot, options=OPTIONS, promote=check_recall)
    return manifest


def test_parts_are_the_same_as_a_whole(store, monkeypatch):
    snapshot = snapshot_of(store)
    in_parts = built(store, snapshot)
    store.remove("indexes")
    monkeypatch.setattr(building, "SHARD_ROWS", 10**6)
    assert built(store, snapshot).files == in_parts.files


def test_ray_builds_the_same(store, local_ray, monkeypatch):
    snapshot = snapshot_of(store)
    here = built(store, snapshot)
    store.remove("indexes")
    monkeypatch.setattr(building, "ray", ray)
    assert built(store, snapshot).files == here.files


def test_a_build_that_was_killed_goes_on_with_the_shards_that_are_whole(store, monkeypatch):
    snapshot = snapshot_of(store)
    done: list[int] = []
    build_shard = shards.build_shard

    def killed(shard: shards.Shard, **words) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        build_shard(shard, **words)
        done.append(shard.number)

    with monkeypatch.context() as patch:
        patch.setattr(building, "build_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            built(store, snapshot)
    trained = []
    monkeypatch.setattr(building, "train", lambda *_, **__: trained.append(1))
    monkeypatch.setattr(
        building,
        "build_shard",
        lambda shard, **words: (done.append(shard.number), build_shard(shard, **words)),
    )
    manifest = built(store, snapshot)
    assert (done, trained) == ([0, 1, 2], [])
    index = open_build(store, manifest)
    assert index.rows.num_rows == NUM_FILES * ROWS_PER_FILE
    assert not [
        name for name in store.names(manifest.folder) if name.startswith(("shards", "asked"))
    ]


def test_another_machine_goes_on_with_a_build_on_an_object_store(tmp_path, monkeypatch):
    """What it needs of the files that are there, it fetches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    local, remote = Store(str(tmp_path / "store")), Store(f"memory://{tmp_path}")
    manifests = [built(local, snapshot_of(local))]
    snapshot = snapshot_of(remote)
    build_shard = shards.build_shard

    def killed(shard: shards.Shard, **words) -> None:
        if shard.number == 2:
            raise KeyboardInterrupt
        build_shard(shard, **words)

    with monkeypatch.context() as patch:
        patch.setattr(building, "build_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            built(remote, snapshot)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    manifests.append(built(remote, snapshot))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    index = open_build(remote, manifests[1])
    assert index.rows.num_rows == NUM_FILES * ROWS_PER_FILE
    assert index.search(np.eye(DIM, dtype=np.float32), num_hits=3)[1].min() >= 0
    of_rows = [manifest.files["hashes.npy"].num_bytes for manifest in manifests]
    assert of_rows[0] == of_rows[1]


def test_ids_go_on_where_a_file_is_read_in_parts(store):
    num_rows = 20_000
    files = [embeddings_file(store, {f"k{row}": [1.0, 0.0] for row in range(num_rows)})]
    work = IndexFiles(store, "indexes", cache_dir=Path())
    placed = list(shards.read_placed(store, work, files, first_ids=(7,)))
    assert len(placed) > 1
    assert np.array_equal(np.concatenate([ids for _, ids in placed]), 7 + np.arange(num_rows))


def test_a_sample_is_of_all_files_and_of_its_seed(store):
    snapshot = snapshot_of(store)
    files = snapshot.files_of("embeddings")
    draw = partial(draw_vectors, store, embedding_dim=DIM)
    drawn = draw(files, num_wanted=300, seed=1)
    assert drawn.shape == (300, DIM)
    assert len(np.unique(drawn, axis=0)) == 300
    assert np.array_equal(drawn, draw(files, num_wanted=300, seed=1))
    assert not np.array_equal(drawn, draw(files, num_wanted=300, seed=2))
    assert len(draw(files, num_wanted=10**6, seed=1)) == 600
    for file in files:
        of_file = {row.tobytes() for row in draw([file], num_wanted=10**6, seed=1)}
        assert 25 < sum(row.tobytes() in of_file for row in drawn) < 75
