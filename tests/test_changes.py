"""What changed between snapshots, against rows that a test wrote."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.snapshots import main
from pipelines import schema
from pipelines.changes import Changes, find_changes
from pipelines.errors import StoreError
from pipelines.snapshots import StoredFile, commit
from pipelines.store import Store
from pipelines.writing import write_table
from tests.stored import PLAN_ID, embeddings_file, make_snapshot

VECTOR = (1.0, 0.0, 0.0, 0.0)
NOTHING = Changes(added=0, removed=0, changed=0, rejected=0, healed=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def embedded(store: Store, contents: dict, *, modality: schema.Modality = "image") -> StoredFile:
    """A file of embeddings of keys with contents."""
    file = embeddings_file(store, dict.fromkeys(contents, VECTOR), modality=modality)
    with store.open(file.path) as opened:
        rows = pa.parquet.read_table(opened)
    fingerprints = pa.array([content.ljust(16).encode() for content in contents.values()])
    column = rows.column_names.index(schema.FINGERPRINT)
    rows = rows.set_column(column, schema.FINGERPRINT, fingerprints.cast(schema.FINGERPRINT_TYPE))
    return write_table(rows, kind="embeddings", modality=modality, plan_id=PLAN_ID, store=store)


def rejected(store: Store, contents: dict) -> StoredFile:
    """A file of rejects of images."""
    fields = schema.rejects_schema(key_type=pa.string())
    columns = {field.name: pa.nulls(len(contents), field.type) for field in fields}
    texts = (schema.STAGE, schema.REASON, schema.SOURCE_FILE)
    columns |= {name: pa.array(["x"] * len(contents), pa.string()) for name in texts}
    columns[schema.SOURCE_ROW] = pa.array(range(len(contents)), pa.int64())
    columns[schema.KEY] = pa.array(list(contents), pa.string())
    columns[schema.FINGERPRINT] = pa.array(
        [content.ljust(16).encode() for content in contents.values()], schema.FINGERPRINT_TYPE
    )
    table = pa.table(columns, schema=fields)
    return write_table(table, kind="rejects", modality="image", plan_id=PLAN_ID, store=store)


def test_each_key_is_counted_once(store: Store):
    shared = embedded(store, {"same": "1", "too": "1"})
    before = make_snapshot(
        [
            shared,
            embedded(store, {"gone": "1", "moved": "1", "changed": "1", "broken": "1"}),
            rejected(store, {"mended": "1", "still broken": "1", "broken otherwise": "1"}),
        ]
    )
    after = make_snapshot(
        [
            shared,
            embedded(store, {"moved": "1", "changed": "2"}),
            embedded(store, {"new": "1", "newer": "1", "mended": "2"}),
            rejected(store, {"still broken": "1", "broken otherwise": "2", "broken": "2"}),
        ],
        number=2,
    )
    expected = Changes(added=2, removed=1, changed=2, rejected=1, healed=1)
    assert find_changes(store, before, after) == {"image": expected}
    back = Changes(added=1, removed=2, changed=2, rejected=1, healed=1)
    assert find_changes(store, after, before) == {"image": back}
    assert find_changes(store, after, after) == {"image": NOTHING}


def test_files_that_both_have_are_not_read(store: Store, tmp_path: Path):
    shared = embedded(store, {"same": "1"})
    snapshots = [make_snapshot([shared]), make_snapshot([shared], number=2)]
    (tmp_path / "store" / shared.path).unlink()
    assert find_changes(store, *snapshots) == {"image": NOTHING}


def test_modalities_are_counted_apart_also_one_that_is_new(store: Store):
    image, text = embedded(store, {"a": "1"}), embedded(store, {"a": "1"}, modality="text")
    before = make_snapshot([image])
    after = make_snapshot([image, text], number=2, modalities=("image", "text"))
    found = find_changes(store, before, after)
    assert found == {"image": NOTHING, "text": dataclasses.replace(NOTHING, added=1)}


def test_keys_of_two_types_are_not_compared(store: Store):
    before, after = make_snapshot([]), make_snapshot([], number=2, key_type="int64")
    with pytest.raises(StoreError, match="string in snapshot 1, int64 in 2: they cannot be"):
        find_changes(store, before, after)


@pytest.fixture
def two_nights(store: Store) -> str:
    first, second = embedded(store, {"a": "1"}), embedded(store, {"b": "1"})
    commit(store, make_snapshot([first]))
    commit(store, make_snapshot([first, second], number=2))
    return store.uri


def test_the_command_lists_shows_and_compares(two_nights: str, capsys: pytest.CaptureFixture):
    where = ["--store", two_nights]
    assert main(["list", *where]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert lines[1].endswith("8 keys: 2 image, 0 rejects")
    assert main(["list", *where, "--json"]) == 0
    assert [entry["number"] for entry in json.loads(capsys.readouterr().out)] == [1, 2]
    assert main(["show", *where]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == lines[1]
    assert "after snapshot 1" in shown
    assert main(["show", *where, "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 1
    assert main(["diff", *where, "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "snapshot 1 -> 2"
    assert said[1].split(maxsplit=1)[1].startswith("1 added, 0 removed, 0 changed, ")
    assert main(["diff", *where, "2", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"]["removed"] == 1


def test_a_snapshot_that_is_not_there(two_nights: str, tmp_path: Path):
    with pytest.raises(StoreError, match="has no snapshot 7, but 1 to 2"):
        main(["show", "--store", two_nights, "7"])
    with pytest.raises(StoreError, match="has no snapshot; run `clipmill embed` first"):
        main(["show", "--store", str(tmp_path / "empty")])


def test_an_empty_store_lists_none(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["list", "--store", str(tmp_path / "empty")]) == 0
    assert "has no snapshot" in capsys.readouterr().out
