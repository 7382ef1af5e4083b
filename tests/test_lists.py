"""Tests of pipelines/indexes/lists.py and bitmaps.py: what is written is what FAISS finds."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from pipelines.indexes.bitmaps import bitmap_of, ids_in, is_set, num_in
from pipelines.indexes.lists import Lists, lists_of, merged_lists, write_lists

DIM, NUM_LISTS = 12, 5


@pytest.fixture
def trained() -> faiss.Index:
    index = faiss.index_factory(DIM, f"IVF{NUM_LISTS},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors_of(300, seed=0))
    return index


def vectors_of(num_rows: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)


def written(path: Path, index: faiss.Index, rows: np.ndarray, ids: np.ndarray) -> Lists:
    part = faiss.clone_index(index)
    part.add_with_ids(rows, ids)
    write_lists(path, lists_of(part), code_size=part.code_size)
    return Lists(path)


def test_merged_lists_find_what_one_index_finds(trained, tmp_path):
    rows, ids = vectors_of(200, seed=1), np.random.default_rng(2).permutation(1000)[:200]
    parts = [
        written(
            tmp_path / f"{first}.ivf", trained, rows[first : first + 50], ids[first : first + 50]
        )
        for first in (0, 50, 100, 150)
    ]
    assert [part.num_rows for part in parts] == [50] * 4
    write_lists(tmp_path / "all.ivf", merged_lists(parts), code_size=parts[0].code_size)
    merged = faiss.clone_index(trained)
    Lists(tmp_path / "all.ivf").attach(merged)
    whole = faiss.clone_index(trained)
    whole.add_with_ids(rows, ids)
    queries = vectors_of(10, seed=3)
    for nprobe in (1, NUM_LISTS):
        merged.nprobe = whole.nprobe = nprobe
        scores, found = merged.search(queries, 20)
        expected_scores, expected = whole.search(queries, 20)
        assert np.array_equal(found, expected)
        assert np.array_equal(scores, expected_scores)


def test_removed_ids_are_left_out_of_the_first_part_alone(trained, tmp_path):
    ids = np.arange(50)
    first = written(tmp_path / "a.ivf", trained, vectors_of(50, seed=1), ids)
    second = written(tmp_path / "b.ivf", trained, vectors_of(50, seed=2), ids)
    merged = list(merged_lists([first, second], removed=bitmap_of(ids[::2], num_ids=64)))
    found = np.sort(np.concatenate([part for _, part in merged]))
    assert found.tolist() == sorted([*range(50), *range(1, 50, 2)])
    assert all(len(codes) == len(part) for codes, part in merged)


def test_no_rows_are_lists_too(trained, tmp_path):
    lists = written(tmp_path / "a.ivf", trained, vectors_of(0, seed=1), np.zeros(0, dtype=np.int64))
    assert (lists.num_rows, lists.num_bytes) == (0, 0)
    index = faiss.clone_index(trained)
    lists.attach(index)
    assert index.search(vectors_of(1, seed=1), 3)[1].tolist() == [[-1] * 3]


@pytest.mark.parametrize("num_bytes", [0, 10, 40, -8, -1])
def test_a_cut_file_is_an_error(trained, tmp_path, num_bytes):
    path = tmp_path / "a.ivf"
    written(path, trained, vectors_of(50, seed=1), np.arange(50))
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises((ValueError, OSError)):
        Lists(path)
    path.write_bytes(b"something else" * 20)
    with pytest.raises(ValueError, match="is cut or no file of lists"):
        Lists(path)


def test_bitmaps_are_sets():
    ids = np.array([0, 7, 8, 30])
    bitmap = bitmap_of(ids, num_ids=31)
    assert ids_in(bitmap).tolist() == ids.tolist()
    assert num_in(bitmap) == 4
    assert is_set(bitmap, np.arange(31)).nonzero()[0].tolist() == ids.tolist()
    assert bitmap.tolist() == [0b10000001, 1, 0, 0b01000000]
