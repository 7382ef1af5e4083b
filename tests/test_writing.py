"""Tests of pipelines/writing.py."""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import schema
from pipelines.snapshots import StoredFile
from pipelines.store import Store
from pipelines.writing import (
    ROWS_PER_GROUP,
    is_encoded,
    staging_dir,
    stored_files,
    write_batch,
    write_table,
)
from tests.meters import ListMeter
from tests.stored import fingerprint

CARRIED = [pa.field("price", pa.decimal128(9, 2)), pa.field("tags", pa.list_(pa.string()))]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


def encoded_rows(rows, *, dtype="float32", key_type=None):
    """What the encode stage hands over, of (key, modality, embedding or None, reason or None)."""
    keys, modalities, embeddings, reasons = zip(*rows, strict=True)
    num_rows = len(rows)
    element = pa.float32() if dtype == "float32" else pa.float16()
    return pa.table(
        {
            "key": pa.array(keys, key_type or pa.string()),
            "modality": modalities,
            "fingerprint": pa.array([fingerprint(f"f{key}") for key in keys], pa.binary(16)),
            "stage": pa.array([reason and "decode" for reason in reasons], pa.string()),
            "reason": pa.array(reasons, pa.string()),
            "detail": pa.array([reason and f"of {reason}" for reason in reasons], pa.string()),
            "source_file": ["a.parquet"] * num_rows,
            "source_row": pa.array(range(num_rows), pa.int64()),
            "price": pa.array([1] * num_rows, pa.decimal128(9, 2)),
            "tags": pa.array([["new"]] * num_rows, pa.list_(pa.string())),
            "embedding": pa.array(
                [
                    None if embedding is None else np.array(embedding, dtype)
                    for embedding in embeddings
                ],
                pa.list_(element, 2),
            ),
        }
    )


def written(table, *, store, dtype="float32", meter=None):
    """The report's files, each with its rows."""
    report = write_batch(
        table,
        store=store,
        plan_id="plan",
        engine_id="engine",
        embeddings_schema=schema.embeddings_schema(
            key_type=table["key"].type, embedding_dim=2, dtype=dtype, carried=CARRIED
        ),
        meter=meter or ListMeter(),
    )
    files = {}
    for file in stored_files(report):
        with store.open(file.path) as opened:
            files[file.kind, file.modality] = (file, pq.read_table(opened))
    assert len(files) == report.num_rows
    return files


MIXED = [
    ("a", "image", [1, 0], None),
    ("b", "image", None, "null_image"),
    ("a", "text", [0, 1], None),
    ("c", "image", [0.6, 0.8], None),
    ("b", "text", None, "empty_text"),
]


def test_a_batch_is_one_file_for_each_kind_and_modality(store):
    files = written(encoded_rows(MIXED), store=store)
    keys = {name: table["key"].to_pylist() for name, (_, table) in files.items()}
    assert keys == {
        ("embeddings", "image"): ["a", "c"],
        ("rejects", "image"): ["b"],
        ("embeddings", "text"): ["a"],
        ("rejects", "text"): ["b"],
    }


def test_the_report_says_what_is_on_disk(store, tmp_path):
    for file, table in written(encoded_rows(MIXED), store=store).values():
        assert file.path.startswith(f"{file.kind}/plan/{file.modality}-")
        assert file.num_rows == table.num_rows
        assert file.num_bytes == (tmp_path / file.path).stat().st_size
        assert set(table["modality"].to_pylist()) == {file.modality}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("key_type", [pa.string(), pa.int64()], ids=str)
def test_embeddings_have_the_schema_and_the_numbers_they_came_with(store, dtype, key_type):
    keys = ["a", "b"] if key_type == pa.string() else [2**62, -1]
    rows = [(keys[0], "image", [0.6, 0.8], None), (keys[1], "image", [1, 0], None)]
    table = encoded_rows(rows, dtype=dtype, key_type=key_type)
    _, stored = written(table, store=store, dtype=dtype)["embeddings", "image"]
    assert stored.schema.equals(
        schema.embeddings_schema(key_type=key_type, embedding_dim=2, dtype=dtype, carried=CARRIED)
    )
    first = stored.to_pylist()[0]
    assert np.array_equal(np.array(first.pop("embedding"), dtype), np.array([0.6, 0.8], dtype))
    assert first == {
        "key": keys[0],
        "modality": "image",
        "fingerprint": fingerprint(f"f{keys[0]}"),
        "engine_id": "engine",
        "price": 1,
        "tags": ["new"],
    }


def test_rejects_say_where_they_came_from_and_why(store):
    _, stored = written(encoded_rows(MIXED), store=store)["rejects", "text"]
    assert stored.schema.equals(schema.rejects_schema(key_type=pa.string()))
    assert stored.to_pylist() == [
        {
            "key": "b",
            "modality": "text",
            "stage": "decode",
            "reason": "empty_text",
            "detail": "of empty_text",
            "source_file": "a.parquet",
            "source_row": 4,
            "fingerprint": fingerprint("fb"),
        }
    ]


def test_what_has_no_rows_has_no_file(store):
    files = written(encoded_rows([("a", "image", [1, 0], None)]), store=store)
    assert list(files) == [("embeddings", "image")]
    assert store.list(staging_dir("rejects", plan_id="plan"), suffix="") == []


def test_writing_a_batch_again_leaves_the_first_file_as_it_was(store):
    written(encoded_rows(MIXED), store=store)
    written(encoded_rows(MIXED), store=store)
    folder = staging_dir("embeddings", plan_id="plan")
    assert len(store.list(folder, suffix=".parquet")) == 4


def test_the_meter_counts_rows_and_the_bytes_of_the_files(store):
    meter = ListMeter()
    files = written(encoded_rows(MIXED), store=store, meter=meter)
    assert meter.batches == [(5, sum(file.num_bytes for file, _ in files.values()))]


def test_a_table_of_whole_rows_has_no_modality(store):
    table = schema.rejects_schema(key_type=pa.string()).empty_table()
    file = write_table(table, kind="rejects", modality=None, plan_id="plan", store=store)
    assert file.modality is None
    assert file.path.startswith("rejects/plan/row-")


def test_a_report_of_several_batches_names_all_files():
    files = [
        StoredFile(path=f"p{number}", kind="rejects", modality=None, num_rows=1, num_bytes=2)
        for number in range(2)
    ]
    report = pa.Table.from_pylist(
        [
            {"path": file.path, "kind": "rejects", "modality": None, "num_rows": 1, "num_bytes": 2}
            for file in files
        ]
    )
    assert stored_files(report) == files


def test_row_groups_are_of_a_size_that_a_reader_can_hold(store, tmp_path):
    table = pa.table({"key": pa.array(range(ROWS_PER_GROUP + 1))})
    file = write_table(table, kind="rejects", modality=None, plan_id="plan", store=store)
    metadata = pq.read_metadata(tmp_path / file.path)
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert groups == [ROWS_PER_GROUP, 1]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_name_tells_what_an_encoder_made_from_rows_that_were_stored(store, modality):
    table = schema.rejects_schema(key_type=pa.string()).empty_table()
    written = functools.partial(
        write_table, table, kind="embeddings", modality=modality, plan_id="plan", store=store
    )
    assert [is_encoded(written()), is_encoded(written(origin="stored"))] == [True, False]
    assert written(origin="stored").path.startswith(f"embeddings/plan/{modality}-")
