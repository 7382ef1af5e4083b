"""Tests of pipelines/guarding/stored_samples.py, on files whose vectors say which row they are."""

import numpy as np
import pytest

from pipelines.guarding import stored_samples
from pipelines.guarding.stored_samples import draw_pairs, draw_sample
from pipelines.snapshots import StoredFile
from pipelines.store import Store
from tests.stored import embeddings_file


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def file_of(store: Store, keys: range, *, sign: float = 1.0) -> StoredFile:
    return embeddings_file(store, {f"k{key}": [sign * key, 0] for key in keys})


@pytest.fixture
def small_draws(monkeypatch):
    """At most 40 rows of at most 4 files."""
    monkeypatch.setattr(stored_samples, "MAX_ROWS", 40)
    monkeypatch.setattr(stored_samples, "MAX_FILES", 4)


def test_a_small_store_is_taken_whole(store):
    files = [file_of(store, range(3)), file_of(store, range(3, 7))]
    sample = draw_sample(store, files)
    assert sample is not None
    assert sorted(sample.keys.to_pylist()) == [f"k{key}" for key in range(7)]
    assert [f"k{int(vector[0])}" for vector in sample.vectors] == sample.keys.to_pylist()
    assert draw_sample(store, []) is None


@pytest.mark.usefixtures("small_draws")
def test_few_rows_of_few_files_are_read(store, monkeypatch):
    files = [file_of(store, range(first, first + 50)) for first in range(0, 1000, 50)]
    opened = []
    of_store = Store.open

    def noted(self, path):
        opened.append(path)
        return of_store(self, path)

    monkeypatch.setattr(Store, "open", noted)
    sample = draw_sample(store, files)
    assert sample is not None
    assert len(set(sample.keys.to_pylist())) == 40
    assert 1 < len(set(opened)) <= 4
    assert draw_sample(store, files[::-1]).keys == sample.keys
    # Files that come mostly leave the others as they were drawn.
    more = [*files, file_of(store, range(1000, 1010))]
    shared = set(draw_sample(store, more).keys.to_pylist()) & set(sample.keys.to_pylist())
    assert len(shared) >= 20


@pytest.mark.usefixtures("small_draws")
def test_rows_are_drawn_as_likely_as_files_are_large(store):
    num_large = 0
    for trial in range(60):
        large = file_of(store, range(90))
        small = [file_of(store, range(100 + part, 101 + part)) for part in range(10)]
        sample = draw_sample(store, [large, *small])
        assert sample is not None
        num_large += any(int(key[1:]) < 90 for key in sample.keys.to_pylist())
        del trial
    assert num_large == 60, "nine tenths of the rows, by four draws each time"


@pytest.mark.usefixtures("small_draws")
def test_pairs_are_of_the_same_keys(store):
    before = [file_of(store, range(first, first + 50)) for first in range(0, 500, 50)]
    after = [file_of(store, range(first, first + 35), sign=-1) for first in range(0, 490, 35)]
    pairs = draw_pairs(store, before, after)
    assert pairs is not None
    assert 30 <= len(pairs[0]) <= 40
    assert np.array_equal(pairs[0][:, 0], -pairs[1][:, 0])
    assert draw_pairs(store, before, [file_of(store, range(900, 905))]) is None
    assert draw_pairs(store, [], after) is None
