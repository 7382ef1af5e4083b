"""Tests of pipelines/assembly.py, with a real ledger and real files."""

import tempfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import schema
from pipelines.assembly import count_rejects, next_files
from pipelines.errors import StoreError
from pipelines.ledger import Ledger
from pipelines.store import Store
from pipelines.writing import is_encoded, write_table
from tests.object_store import s3_bucket
from tests.stored import PLAN_ID, embeddings_file, fingerprint


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture(params=["local", "s3"])
def any_store(request, tmp_path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(str(tmp_path))
        return
    with s3_bucket() as uri:
        yield Store(uri)


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


def assembled(store, keys, files, *, modalities=("image",), committed=None, rows_per_file=2):
    """The next files, of a catalog with these keys in one file that is trusted.

    All of `files` are committed if nothing else is said; with 2 rows for each no file is small.
    """
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
        return next_files(
            files,
            committed=files if committed is None else committed,
            ledger=ledger,
            key_type=pa.string(),
            rows_per_file=rows_per_file,
            plan_id="next",
            store=store,
        )


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
    assert not is_encoded(new)
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


def small_files(store):
    """Nine files of two rows, and their keys."""
    names = [[f"{chr(97 + file)}{row}" for row in range(2)] for file in range(9)]
    files = [embeddings_file(store, vectors(*of_file)) for of_file in names]
    return files, [key for of_file in names for key in of_file]


def test_small_files_become_one_with_the_same_rows(any_store):
    store = any_store
    files, keys = small_files(store)
    keys.remove("c1")
    before = {file.path: rows_of(store, file) for file in files}
    (new,) = assembled(store, keys, files, rows_per_file=100)
    assert new.path.startswith("embeddings/next/image-")
    rows = rows_of(store, new)
    assert rows.schema == before[files[0].path].schema
    expected = pa.concat_tables(before.values())
    expected = expected.filter(np.array(expected["key"].to_pylist()) != "c1")
    assert rows.sort_by("key").equals(expected.sort_by("key"))
    assert all(rows_of(store, file).equals(before[file.path]) for file in files)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_nights=st.integers(1, 12),
    rows_per_file=st.sampled_from([2, 20, 64]),
)
@settings(max_examples=8)
def test_over_random_nights_every_row_stays_bit_for_bit(seed, num_nights, rows_per_file):
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        expected: dict[str, list[float]] = {}
        files = []
        before: dict[str, pa.Table] = {}
        for _ in range(num_nights):
            gone = [key for key in expected if rng.random() < rng.choice([0.02, 0.3])]
            expected = {key: row for key, row in expected.items() if key not in gone}
            # Under keys that may have been there: those of dead rows come again.
            names = {f"k{rng.integers(200)}" for _ in range(rng.integers(1, 25))}
            new = {key: rng.random(3).tolist() for key in sorted(names.difference(expected))}
            written = [embeddings_file(store, new)] if new else []
            expected |= new
            # What changed has the fingerprint of its key as all have: it must be out before.
            left = sorted(set(expected) - set(new))
            files = assembled(store, left, files, committed=[], rows_per_file=rows_per_file)
            files = assembled(
                store,
                sorted(expected),
                [*files, *written],
                committed=files,
                rows_per_file=rows_per_file,
            )
            found = [row for file in files for row in rows_of(store, file).to_pylist()]
            assert {row["key"]: row["embedding"] for row in found} == {
                key: np.float32(row).tolist() for key, row in expected.items()
            }
            assert len(found) == len(expected)
            assert {row["fingerprint"] for row in found} == set(map(fingerprint, expected))
            assert all(file.num_rows <= max(rows_per_file, 25) for file in files)
            # Readers of earlier snapshots have what they had.
            assert all(pq.read_table(path).equals(rows) for path, rows in before.items())
            before |= {f"{folder}/{file.path}": rows_of(store, file) for file in files}


def test_if_no_row_came_or_went_small_files_stay(store):
    files, keys = small_files(store)
    assert assembled(store, keys, files, rows_per_file=100) == files
    assert len(assembled(store, keys, files, committed=files[1:], rows_per_file=100)) == 1


def test_files_of_other_columns_are_not_merged(store):
    """Of a Clipmill that let carried columns change."""
    files, keys = small_files(store)
    table = rows_of(store, files[0]).append_column("price", pa.array([1, 2]))
    priced = write_table(table, kind="embeddings", modality="image", plan_id=PLAN_ID, store=store)
    new = assembled(store, keys, [priced, *files[1:]], committed=[], rows_per_file=100)
    assert sorted(file.num_rows for file in new) == [2, 16]
    assert {"price" in rows_of(store, file).column_names for file in new} == {True, False}


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
            next_files(
                [file],
                committed=[file],
                ledger=ledger,
                key_type=pa.string(),
                rows_per_file=2,
                plan_id="next",
                store=store,
            )


def test_rejects_are_counted_by_reason_the_most_frequent_first(store):
    files = [
        rejects_file(store, [("a", "empty_image"), ("b", "null_image")]),
        rejects_file(store, [("c", "null_image")]),
        rejects_file(store, [("a", "null_text")] * 3, modality="text"),
    ]
    counts = count_rejects(store, files)
    assert list(counts.items()) == [("null_text", 3), ("null_image", 2), ("empty_image", 1)]
    assert count_rejects(store, []) == {}
