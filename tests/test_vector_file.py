"""Tests of pipelines/indexes/vector_file.py: rows as numpy has them, from warm and cold files."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import StoreError
from pipelines.indexes import vector_file
from pipelines.indexes.vector_file import VectorFile, resize_vectors, write_at_ids

NUM_ROWS, DIM = 20_000, 24


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((NUM_ROWS, DIM)).astype(np.float16)


@pytest.fixture
def path(tmp_path: Path, vectors: np.ndarray) -> Path:
    np.save(tmp_path / "vectors.npy", vectors)
    return tmp_path / "vectors.npy"


@pytest.mark.parametrize("is_cold", [False, True])
def test_rows_are_those_of_the_array(
    path: Path, vectors: np.ndarray, is_cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = VectorFile(path)
    wanted = []
    real = os.posix_fadvise
    monkeypatch.setattr(
        vector_file.os, "posix_fadvise", lambda *place: wanted.append(place) or real(*place)
    )
    if is_cold:
        # As of a disk whose file nobody has read: that it is asked for all rows before the first.
        monkeypatch.setattr(VectorFile, "_read_cached", lambda self, part, offset: False)
    ids = np.array([0, NUM_ROWS - 1, 7, 7, *range(100, 9_000, 13)])
    found = opened.rows(ids)
    assert found.dtype == np.float32
    assert np.array_equal(found, vectors[ids].astype(np.float32))
    asked = [place for place in wanted if place[3] == os.POSIX_FADV_WILLNEED]
    # Of a file that was just written all is in memory; but a row may lie on two pages.
    assert len(asked) == len(ids) if is_cold else len(asked) < len(ids) / 2


def test_no_rows_at_all(path: Path) -> None:
    assert VectorFile(path).rows(np.zeros(0, np.int64)).shape == (0, DIM)


def test_where_nobody_can_tell_what_is_in_memory(
    path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(descriptor: int, parts: list, offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(95, "Operation not supported")
        return real(descriptor, parts, offset)

    monkeypatch.setattr(vector_file.os, "preadv", preadv)
    ids = np.arange(0, NUM_ROWS, 501)
    assert np.array_equal(VectorFile(path).rows(ids), vectors[ids].astype(np.float32))


def test_several_threads_read_at_once(path: Path, vectors: np.ndarray) -> None:
    opened = VectorFile(path)
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            ids = rng.integers(0, NUM_ROWS, 100)
            if not np.array_equal(opened.rows(ids), vectors[ids].astype(np.float32)):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_file_is_closed_with_its_owner(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    opened = VectorFile(path)
    opened.rows(np.array([1]))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del opened
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_cut_while_it_is_open_is_said(path: Path) -> None:
    opened = VectorFile(path)
    os.truncate(path, 1_000)
    with pytest.raises(StoreError, match="was cut while it was open"):
        opened.rows(np.array([NUM_ROWS - 1]))


@pytest.mark.parametrize(
    "other",
    [np.zeros((3, 4), np.float32), np.zeros(3, np.float16), np.zeros((3, 4, 1), np.float16)],
)
def test_another_array_is_refused(tmp_path: Path, other: np.ndarray) -> None:
    np.save(tmp_path / "other.npy", other)
    with pytest.raises(ValueError, match=r"not float16 \[N, D\]"):
        VectorFile(tmp_path / "other.npy")


def test_a_cut_file_is_refused(path: Path) -> None:
    os.truncate(path, 10_000)
    with pytest.raises(ValueError, match="mmap"):
        VectorFile(path)


def test_rows_are_written_where_their_ids_say_and_others_stay(
    tmp_path: Path, vectors: np.ndarray
) -> None:
    path = tmp_path / "written.npy"
    ids = np.array([3, 4, 5, 0, 2, 1])
    parts = [(vectors[:4].astype(np.float32), ids[:4]), (vectors[4:6], ids[4:])]
    write_at_ids(path, parts, first_byte=resize_vectors(path, num_ids=6, dim=DIM))
    assert np.array_equal(VectorFile(path).rows(ids), vectors[:6])
    first_byte = resize_vectors(path, num_ids=8, dim=DIM)
    write_at_ids(path, [(vectors[6:8], np.array([7, 2]))], first_byte=first_byte)
    kept = [0, 1, 2, 3, 5]
    assert np.array_equal(VectorFile(path).rows(ids[kept]), vectors[kept])
    assert np.array_equal(VectorFile(path).rows(np.array([7, 2])), vectors[6:8])
