"""Tests of pipelines/snapshots.py."""

import dataclasses
import json

import pytest

from pipelines.errors import CommitConflictError, StoreError
from pipelines.snapshots import (
    FORMAT_VERSION,
    StoredFile,
    commit,
    current_snapshot,
    snapshot_numbers,
)
from pipelines.store import Store
from tests.stored import make_snapshot


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    local = str(tmp_path / "store")
    return Store(local if request.param == "local" else f"memory://{tmp_path.name}")


def stored(path, kind, modality, num_rows) -> StoredFile:
    return StoredFile(path=path, kind=kind, modality=modality, num_rows=num_rows, num_bytes=100)


FILES = [
    stored("embeddings/p/image-1.parquet", "embeddings", "image", 5),
    stored("embeddings/p/image-2.parquet", "embeddings", "image", 7),
    stored("embeddings/p/text-1.parquet", "embeddings", "text", 11),
    stored("rejects/p/image-1.parquet", "rejects", "image", 2),
    stored("rejects/p/row-1.parquet", "rejects", None, 3),
]
SNAPSHOT = make_snapshot(FILES, modalities=("image", "text"))


def damaged(store: Store, manifest: bytes) -> None:
    store.publish("snapshots/00000002.json", manifest)


def test_an_empty_store_has_no_snapshot(store):
    assert current_snapshot(store) is None


def test_what_is_committed_is_read_again(store):
    commit(store, SNAPSHOT)
    assert current_snapshot(store) == SNAPSHOT


def test_the_highest_number_is_current_whatever_the_order_and_the_digits(store):
    for number in (2, 10, 9, 1):
        commit(store, make_snapshot(FILES, number=number))
    current = current_snapshot(store)
    assert current is not None
    assert (current.number, current.parent) == (10, 9)


def test_what_is_no_manifest_is_no_snapshot(store):
    commit(store, SNAPSHOT)
    store.publish("snapshots/notes.json", b"{}")
    assert snapshot_numbers(store) == [1]
    assert current_snapshot(store) == SNAPSHOT


def test_a_number_is_committed_once(store):
    commit(store, SNAPSHOT)
    with pytest.raises(CommitConflictError, match=r"00000001\.json exists"):
        commit(store, dataclasses.replace(SNAPSHOT, run_id="another"))
    assert current_snapshot(store) == SNAPSHOT


def test_the_manifest_is_json_for_any_reader(store):
    commit(store, SNAPSHOT)
    record = json.loads(store.read("snapshots/00000001.json"))
    assert record["format_version"] == FORMAT_VERSION
    assert [file["path"] for file in record["files"]] == [file.path for file in FILES]
    assert record["engine"]["engine_id"] == SNAPSHOT.engine.engine_id


def test_a_newer_format_is_refused_with_the_way_out(store):
    commit(store, SNAPSHOT)
    record = json.loads(store.read("snapshots/00000001.json"))
    record |= {"format_version": FORMAT_VERSION + 1, "unknown": "field"}
    damaged(store, json.dumps(record).encode())
    with pytest.raises(StoreError, match=r"is of format 2, this Clipmill reads 1; upgrade"):
        current_snapshot(store)


@pytest.mark.parametrize(
    "manifest",
    [
        *(b"", b"{", b"[]", b"1", b"null", b"{}", b"\xff"),
        b'{"format_version": 1}',
        b'{"format_version": "one"}',
        b'{"format_version": 1, "engine": [], "catalog": {}}',
    ],
)
def test_a_damaged_manifest_is_named_with_the_way_out(store, manifest):
    commit(store, SNAPSHOT)
    damaged(store, manifest)
    with pytest.raises(StoreError, match=r"00000002\.json is damaged .*; move it away"):
        current_snapshot(store)


@pytest.mark.parametrize("field", ["number", "engine", "catalog", "modalities", "files"])
def test_a_manifest_that_lacks_a_field_is_damaged(store, field):
    commit(store, SNAPSHOT)
    record = json.loads(store.read("snapshots/00000001.json"))
    del record[field]
    damaged(store, json.dumps(record).encode())
    with pytest.raises(StoreError, match=f"damaged.*{field}"):
        current_snapshot(store)


def test_unfinished_files_are_no_snapshots(store):
    commit(store, SNAPSHOT)
    store.publish("snapshots/.00000002.json.0123", b"half")
    store.publish("snapshots/00000003.json.part", b"half")
    assert current_snapshot(store) == SNAPSHOT


def test_files_and_rows_by_kind_and_modality():
    assert SNAPSHOT.files_of("embeddings") == FILES[:3]
    assert SNAPSHOT.files_of("embeddings", modality="image") == FILES[:2]
    assert SNAPSHOT.files_of("rejects") == FILES[3:]
    assert SNAPSHOT.files_of("rejects", modality="text") == []
    assert SNAPSHOT.num_rows("embeddings") == 23
    assert SNAPSHOT.num_rows("embeddings", modality="image") == 12
    assert SNAPSHOT.num_rows("rejects") == 5
    assert SNAPSHOT.num_rows("rejects", modality="text") == 0
