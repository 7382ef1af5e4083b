"""Tests of pipelines/indexes/index_files.py: copies of indexes of a store that is not on a disk."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.indexes.index_files import STALE_SECONDS
from pipelines.indexes.opening import cache_dir, cache_root, open_index
from pipelines.indexing import IndexConfig, build_index
from pipelines.store import Store
from tests.stored import commit_vectors

DIM = 8


def age(folder: Path, *, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_copies_that_nobody_opened_for_a_week_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = Store(f"memory://{tmp_path.name}")
    vectors = np.eye(DIM, dtype=np.float32)
    first = commit_vectors(store, image=[{f"k{row}": vectors[row] for row in range(4)}])
    (old,) = build_index(IndexConfig(store_uri=store.uri))
    opened = open_index(store, first, modality="image")
    second = commit_vectors(store, number=2, image=[{f"k{row}": vectors[row] for row in range(8)}])
    (new,) = build_index(IndexConfig(store_uri=store.uri))

    open_index(store, second, modality="image")
    assert cache_dir(store, old).is_dir()
    assert cache_dir(store, new).is_dir()
    left_by_a_kill = cache_root(store) / "building" / "attempt"
    (left_by_a_kill / "shards").mkdir(parents=True)
    for folder in (cache_dir(store, old), cache_dir(store, new), left_by_a_kill):
        age(folder, seconds=STALE_SECONDS + 60)

    open_index(store, second, modality="image")
    assert not cache_dir(store, old).exists()
    assert not left_by_a_kill.exists()
    # That which is opened stays, however old.
    assert cache_dir(store, new).is_dir()
    # Who has the old one open goes on.
    _, ids = opened.search(vectors[:4], num_hits=1)
    assert [opened.rows.keys_of(row).to_pylist() for row in ids] == [[f"k{n}"] for n in range(4)]
    # And it can be opened anew.
    _, ids = open_index(store, first, modality="image").search(vectors[:1], num_hits=1)
    assert ids.tolist() == [[0]]
