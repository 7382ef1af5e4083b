"""Tests of pipelines/stored_rows.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from pipelines.errors import StoreError
from pipelines.store import Store
from pipelines.stored_rows import READ_THREADS, read_stored
from tests.stored import embeddings_file


class CountingStore(Store):
    """Counts the files that were opened."""

    num_opened = 0

    @contextmanager
    def open(self, relative: str) -> Iterator[BinaryIO]:
        self.num_opened += 1
        with super().open(relative) as file:
            yield file


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(str(tmp_path))


def test_some_columns_of_all_files_in_their_order(store: CountingStore):
    files = [embeddings_file(store, {f"k{number}": [1.0, 0.0]}) for number in range(20)]
    read = list(read_stored(store, files, columns=["key", "modality"]))
    assert [file for file, _ in read] == files
    assert [rows.to_pydict() for _, rows in read] == [
        {"key": [f"k{number}"], "modality": ["image"]} for number in range(20)
    ]


def test_of_many_files_few_are_held_at_once(store: CountingStore):
    file = embeddings_file(store, {"a": [1.0, 0.0]})
    for number, _ in enumerate(read_stored(store, [file] * 100, columns=["key"])):
        assert store.num_opened <= number + READ_THREADS


def test_a_file_that_cannot_be_read_is_an_error_of_the_store(store: CountingStore):
    file = embeddings_file(store, {"a": [1.0, 0.0]})
    store.remove(file.path)
    with pytest.raises(StoreError, match=f"{file.path} cannot be read"):
        list(read_stored(store, [file], columns=["key"]))
