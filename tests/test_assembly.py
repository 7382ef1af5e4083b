"""Tests of pipelines/assembly.py, with a real ledger and real files."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import schema
from pipelines.assembly import count_rejects, next_files
from pipelines.errors import StoreError
from pipelines.ledger import Ledger
from pipelines.store import Store
from pipelines.writing import write_table
from tests.stored import PLAN_ID, embeddings_file, fingerprint


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


def vectors(*keys):
    """Key -> an embedding that only this key has."""
    return {key: [float(ord(key[0])), float(position)] for position, key in enumerate(keys)}


def rejects_file(store, rows, *, modality="image"):
    """Rows of (key, reason)."""
    table_schema = schema.rejects_schema(key_type=pa.string())
    table = pa.Table.from_pylist(
        [
            {
                "key": key,
                "modality": modality,
                "stage": "decode",
                "reason": reason,
                "detail": None,
                "source_file": "a",
                "source_row": row,
                "fingerprint": fingerprint(str(key)),
            }
            for row, (key, reason) in enumerate(rows)
        ],
        schema=table_schema,
    )
    return write_table(table, kind="rejects", modality=modality, plan_id=PLAN_ID, store=store)


def rows_of(store, file):
    with store.open(file.path) as opened:
        return pq.read_table(opened)


def assembled(store, keys, files, *, modalities=("image",)):
    """The next files, of a catalog with these keys in one file that is trusted."""
    with Ledger(key_type=pa.string(), modalities=modalities) as ledger:
        columns = {
            "source_file": ["a"] * len(keys),
            "source_row": np.arange(len(keys)),
            "key": pa.array(keys, pa.string()),
        }
        columns |= {name: pa.nulls(len(keys), pa.binary(16)) for name in modalities}
        ledger.add_catalog_rows(pa.table(columns), trusted=True)
        for file in files:
            if file.modality:
                reason = ["reason"] if file.kind == "rejects" else []
                rows = rows_of(store, file).select(["key", "fingerprint", *reason])
                ledger.add_stored_rows(rows, file=file)
        ledger.settle()
        return next_files(files, ledger=ledger, key_type=pa.string(), plan_id="next", store=store)


def test_files_of_live_rows_only_are_taken_as_they_are(store):
    files = [
        embeddings_file(store, vectors("a", "b")),
        embeddings_file(store, vectors("a", "b"), modality="text"),
        rejects_file(store, [("c", "null_image")]),
    ]
    assert assembled(store, ["a", "b", "c"], files, modalities=("image", "text")) == files
    assert store.list("embeddings/next", suffix="") == []


def test_dead_rows_are_left_out_of_a_new_file_and_the_old_one_stays(store):
    old = embeddings_file(store, vectors("a", "gone", "b", "lost", "c"))
    before = rows_of(store, old)
    (new,) = assembled(store, ["a", "b", "c"], [old])
    assert new.path.startswith("embeddings/next/image-")
    assert (new.kind, new.modality, new.num_rows) == ("embeddings", "image", 3)
    assert rows_of(store, new).equals(before.take([0, 2, 4]))
    assert rows_of(store, old).equals(before)


def test_dead_rejects_are_left_out_too(store):
    old = rejects_file(store, [("gone", "null_image"), ("a", "empty_image")])
    (new,) = assembled(store, ["a"], [old])
    assert new.kind == "rejects"
    assert rows_of(store, new)["reason"].to_pylist() == ["empty_image"]


def test_a_file_without_live_rows_is_dropped(store):
    files = [embeddings_file(store, vectors("gone")), embeddings_file(store, vectors("a"))]
    assert assembled(store, ["a"], files) == files[1:]


def test_a_row_stored_twice_is_kept_once(store):
    files = [embeddings_file(store, vectors("a", "b")), embeddings_file(store, vectors("b", "a"))]
    kept = assembled(store, ["a", "b"], files)
    keys = [key for file in kept for key in rows_of(store, file)["key"].to_pylist()]
    assert sorted(keys) == ["a", "b"]


def test_rejects_of_whole_rows_are_written_once_and_taken_on_while_they_are_the_same(store):
    file = embeddings_file(store, vectors("a"))
    keys = ["a", None, "a"]
    kept, rejects = assembled(store, keys, [file])
    assert kept == file
    assert (rejects.kind, rejects.modality, rejects.num_rows) == ("rejects", None, 2)
    assert rejects.path.startswith("rejects/next/row-")
    assert rows_of(store, rejects)["reason"].to_pylist() == ["null_key", "duplicate_key"]

    assert assembled(store, keys, [file, rejects]) == [file, rejects]
    kept, fewer = assembled(store, ["a", None], [file, rejects])
    assert fewer.path != rejects.path
    assert rows_of(store, fewer)["reason"].to_pylist() == ["null_key"]
    assert assembled(store, ["a"], [file, rejects]) == [file]


def test_a_damaged_file_is_named(store, tmp_path):
    file = embeddings_file(store, vectors("a", "gone"))
    with Ledger(key_type=pa.string(), modalities=("image",)) as ledger:
        rows = {"source_file": ["a"], "source_row": [0], "key": ["a"]}
        rows["image"] = pa.nulls(1, pa.binary(16))
        ledger.add_catalog_rows(pa.table(rows), trusted=True)
        ledger.add_stored_rows(rows_of(store, file).select(["key", "fingerprint"]), file=file)
        ledger.settle()
        (tmp_path / file.path).write_bytes(b"PAR1 damaged PAR1")
        with pytest.raises(StoreError, match=f"{file.path} is damaged"):
            next_files([file], ledger=ledger, key_type=pa.string(), plan_id="next", store=store)


def test_rejects_are_counted_by_reason_the_most_frequent_first(store):
    files = [
        rejects_file(store, [("a", "empty_image"), ("b", "null_image")]),
        rejects_file(store, [("c", "null_image")]),
        rejects_file(store, [("a", "null_text")] * 3, modality="text"),
    ]
    counts = count_rejects(store, files)
    assert list(counts.items()) == [("null_text", 3), ("null_image", 2), ("empty_image", 1)]
    assert count_rejects(store, []) == {}
