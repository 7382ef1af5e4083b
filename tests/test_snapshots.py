"""Tests of pipelines/snapshots.py."""

import dataclasses
import json

import pytest

from jobs.snapshots import main
from pipelines.counts import KeyCounts
from pipelines.errors import CommitConflictError, StoreError
from pipelines.lineage import Lineage, Measurement
from pipelines.snapshots import (
    FORMAT_VERSION,
    StoredFile,
    commit,
    current_snapshot,
    missing_files,
    read_log,
    read_snapshot,
    rollback,
    snapshot_numbers,
)
from pipelines.store import Store
from tests.commands import command
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


@pytest.mark.parametrize("place", [(), ("files", 0), ("engine",), ("catalog",)])
def test_a_field_of_a_newer_clipmill_is_no_damage(store, place):
    """Of the same format: nodes of a cluster are upgraded one after the other."""
    commit(store, SNAPSHOT)
    record = json.loads(store.read("snapshots/00000001.json"))
    part = record
    for name in place:
        part = part[name]
    part["hue"] = 1
    store.publish("snapshots/00000001.json", json.dumps(record).encode())
    with pytest.raises(StoreError, match=r"written by a newer Clipmill.*'hue'; upgrade") as caught:
        current_snapshot(store)
    assert "damaged" not in str(caught.value)


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
    with pytest.raises(
        StoreError, match=r"00000002\.json is damaged .*; move it away, and .* is current again"
    ):
        current_snapshot(store)


def test_the_list_goes_on_beside_a_damaged_manifest(store):
    three_nights(store)
    damaged(store, b'{"format_version"')
    log = dict(read_log(store))
    assert [log[number] for number in (1, 3)] == [read_snapshot(store, n) for n in (1, 3)]
    assert str(log[2]).endswith("; move it away: no other snapshot needs it")


def test_the_command_lists_what_can_be_read(tmp_path):
    store = Store(str(tmp_path))
    three_nights(store)
    damaged(store, b"")
    done = command(main, ["list", "--store", store.uri])
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == ["1", "2", "3"]
    assert "00000002.json is damaged" in done.out
    entries = command(main, ["list", "--store", store.uri, "--json"]).json
    assert [entry["number"] for entry in entries] == [1, 2, 3]
    assert "damaged" in entries[1]["error"]


def test_a_log_is_listed_once(store, monkeypatch):
    three_nights(store)
    listed = []
    names = Store.names

    def noted(self, folder: str) -> list[str]:
        listed.append(folder)
        return names(self, folder)

    monkeypatch.setattr(Store, "names", noted)
    assert [number for number, _ in read_log(store)] == [1, 2, 3]
    assert listed == ["snapshots"]


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


def three_nights(store: Store) -> list:
    """Three snapshots of files that are there."""
    snapshots = [
        make_snapshot(FILES[:2]),
        dataclasses.replace(make_snapshot(FILES, number=2), modalities=("image", "text")),
        make_snapshot([FILES[0], FILES[3]], number=3),
    ]
    for file in FILES:
        store.publish(file.path, b"rows")
    for snapshot in snapshots:
        commit(store, snapshot)
    return snapshots


def test_a_rollback_is_a_new_snapshot_that_is_the_same_as_the_old(store):
    snapshots = three_nights(store)
    restored = rollback(store, 2)
    assert (restored.number, restored.parent, restored.restores) == (4, 3, 2)
    assert restored.created_at > snapshots[1].created_at
    assert current_snapshot(store) == restored
    assert [read_snapshot(store, number) for number in (1, 2, 3)] == snapshots
    changed = ("number", "parent", "created_at", "restores")
    same = {name: getattr(snapshots[1], name) for name in changed}
    assert dataclasses.replace(restored, **same) == snapshots[1]


def test_a_rollback_can_be_rolled_back_and_restored(store):
    snapshots = three_nights(store)
    rollback(store, 1)
    back = rollback(store, 3)
    assert (back.number, back.parent, back.restores) == (5, 4, 3)
    assert back.files == snapshots[2].files
    again = rollback(store, 4)
    assert (again.number, again.restores, again.files) == (6, 4, snapshots[0].files)


def test_a_rollback_reads_no_file(store):
    """They could not even be read as Parquet."""
    three_nights(store)
    before = {file.path: store.modified_at(file.path) for file in FILES}
    rollback(store, 1)
    assert {file.path: store.modified_at(file.path) for file in FILES} == before


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (4, "snapshot 4 is the current one, 4; there is nothing to roll back"),
        (1, "snapshot 1 has the very files of the current one, 4"),
        (9, "has no snapshot 9, but 1 to 4"),
    ],
)
def test_what_cannot_be_rolled_back_to(store, number, message):
    three_nights(store)
    rollback(store, 1)
    with pytest.raises(StoreError, match=message):
        rollback(store, number)
    assert snapshot_numbers(store) == [1, 2, 3, 4]


def test_an_empty_store_has_nothing_to_roll_back_to(store):
    with pytest.raises(StoreError, match="has no snapshot; run `clipmill embed` first"):
        rollback(store, 1)


def test_a_snapshot_whose_files_are_gone_is_not_restored(store):
    three_nights(store)
    store.remove(FILES[1].path)
    store.remove("rejects/p")
    with pytest.raises(StoreError, match=r"3 files of snapshot 2 are gone, embeddings/p/image-2"):
        rollback(store, 2)
    assert snapshot_numbers(store) == [1, 2, 3]
    assert missing_files(store, FILES) == [FILES[1].path, FILES[3].path, FILES[4].path]
    assert missing_files(store, []) == []


def test_each_folder_is_listed_once(store, monkeypatch):
    files = [stored(f"embeddings/{n % 2}/{n}.parquet", "embeddings", "image", 1) for n in range(50)]
    for file in files:
        store.publish(file.path, b"rows")
    listed = []
    names = Store.names

    def noted(self, folder: str) -> list[str]:
        listed.append(folder)
        return names(self, folder)

    monkeypatch.setattr(Store, "names", noted)
    assert missing_files(store, files) == []
    assert sorted(listed) == ["embeddings/0", "embeddings/1"]


def test_of_a_rollback_and_a_run_at_once_one_commits(store, monkeypatch):
    snapshots = three_nights(store)
    run = dataclasses.replace(snapshots[2], number=4, run_id="another")

    def late(store: Store, files) -> list[str]:
        commit(store, run)
        return []

    monkeypatch.setattr("pipelines.snapshots.missing_files", late)
    with pytest.raises(CommitConflictError, match="another run committed it first"):
        rollback(store, 1)
    assert current_snapshot(store) == run


def test_a_manifest_of_before_rollbacks_restores_nothing(store):
    commit(store, SNAPSHOT)
    record = json.loads(store.read("snapshots/00000001.json"))
    del record["restores"]
    store.publish("snapshots/00000001.json", json.dumps(record).encode())
    assert current_snapshot(store) == SNAPSHOT
    assert SNAPSHOT.restores is None


def test_the_command_rolls_back_and_says_so(tmp_path):
    store = Store(str(tmp_path))
    three_nights(store)
    where = ["--store", store.uri]
    done = command(main, ["rollback", "1", *where])
    assert done.code == 0
    assert done.out.split()[0] == "4"
    assert done.out.rstrip().endswith("8 keys: 12 image, 0 rejects, restores 1")
    again = command(main, ["rollback", "2", *where, "--json"])
    assert (again.json["number"], again.json["restores"]) == (5, 2)
    lines = command(main, ["list", *where]).out.splitlines()
    assert ["restores" in line for line in lines] == [False, False, False, True, True]
    assert [entry["restores"] for entry in command(main, ["list", *where, "--json"]).json] == [
        *(None, None, None, 1, 2)
    ]
    assert "restores 2\n" in command(main, ["show", *where]).out
    assert command(main, ["show", *where, "--json"]).json["restores"] == 2
    refused = command(main, ["rollback", "5", *where])
    assert (refused.code, refused.out) == (1, "")
    assert "nothing to roll back" in refused.err
    assert command(main, ["rollback", *where]).code == 2


def test_how_a_snapshot_came_about_is_read_again(store):
    lineage = Lineage(
        plan={
            "image": KeyCounts(
                num_new=1,
                num_changed=0,
                num_retried=0,
                num_moved=0,
                num_unchanged=4,
                num_staged=0,
                num_deleted=0,
                num_twins=0,
            ),
            "text": KeyCounts(
                num_new=0,
                num_changed=0,
                num_retried=0,
                num_moved=0,
                num_unchanged=11,
                num_staged=0,
                num_deleted=0,
                num_twins=0,
            ),
        },
        code_version="1.2.3",
        command=("clipmill", "nightly"),
        accepted=("drift",),
        measurements=(
            Measurement(
                guard="drift",
                modality="image",
                value=0.5,
                bound=0.9,
                is_tripped=True,
                detail="5 rows",
            ),
        ),
    )
    commit(store, dataclasses.replace(SNAPSHOT, lineage=lineage))
    current = current_snapshot(store)
    assert current is not None
    assert current.lineage == lineage


def test_a_manifest_of_before_lineages_is_read(store):
    commit(store, SNAPSHOT)
    record = json.loads(store.read("snapshots/00000001.json"))
    del record["lineage"]
    store.publish("snapshots/00000001.json", json.dumps(record).encode())
    assert current_snapshot(store) == SNAPSHOT
