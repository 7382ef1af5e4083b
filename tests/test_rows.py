"""Keys and carried columns by id and back, over many nights, with a dict as the known answer."""

import datetime
import random
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import StoreError
from pipelines.indexes import key_hashes, row_writing, rows
from pipelines.indexes.row_writing import update_rows, write_rows
from pipelines.indexes.rows import RowTable

STRINGS = st.text(
    alphabet=st.characters(exclude_categories=["Cs"]), max_size=3
)  # few, so that they come again
INTEGERS = st.sampled_from([0, 1, -1, 255, 256, 2**63 - 1, -(2**63), *range(2, 12)])


@pytest.fixture(params=["xxh3", "3 hashes"])
def hashing(request: pytest.FixtureRequest) -> Iterator[None]:
    """With few hashes nearly all keys share theirs with others."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "3 hashes":
            patch.setattr(key_hashes, "hash_content", lambda content: sum(content) % 3)
        yield


@pytest.fixture
def small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BATCH_ROWS", 8)
        patch.setattr(row_writing, "BATCH_ROWS", 8)
        yield


def table_of(values: dict[Any, Any], *, key_type: pa.DataType) -> pa.Table:
    return pa.table(
        {"key": pa.array(list(values), key_type), "price": pa.array(values.values(), pa.int64())}
    )


def content(table: RowTable) -> dict[Any, tuple[int, Any]]:
    """Key -> id and price, by ways that must agree."""
    ids = np.arange(table.num_ids)
    keys = table.keys_of(ids).to_pylist()
    assert keys == [table.key_of(row_id) for row_id in ids.tolist()]
    bits = np.unpackbits(table.alive(), bitorder="little", count=table.num_ids)
    assert [key is not None for key in keys] == bits.astype(bool).tolist()
    columns = table.columns_of(ids)
    return {
        key: (row_id, columns[row_id]["price"])
        for row_id, key in enumerate(keys)
        if key is not None
    }


def key_cases() -> st.SearchStrategy[tuple[pa.DataType, Any]]:
    return st.sampled_from([(pa.string(), STRINGS), (pa.int64(), INTEGERS)])


@settings(
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_many_nights_are_what_a_dict_says(
    hashing: None,
    small_batches: None,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
):
    key_type, keys = data.draw(key_cases())
    nights = st.dictionaries(keys, st.integers(0, 99) | st.none(), max_size=20)
    folder = tmp_path_factory.mktemp("rows")
    known: dict[Any, Any] = data.draw(nights)
    write_rows(folder / "0", [table_of(known, key_type=key_type)])
    table = RowTable(folder / "0")
    assert content(table) == {
        key: (row_id, value) for row_id, (key, value) in enumerate(known.items())
    }
    for night in range(1, data.draw(st.integers(2, 5))):
        before = content(table)
        removed = [key for key in known if data.draw(st.booleans())]
        coming = data.draw(nights)
        added_ids = update_rows(
            folder / str(night),
            parent=table,
            removed_ids=table.ids_of(pa.array(removed, key_type)),
            added=table_of(coming, key_type=key_type),
        )
        known = {key: value for key, value in known.items() if key not in removed} | coming
        num_ids = table.num_ids
        table = RowTable(folder / str(night))
        after = content(table)
        assert {key: value for key, (_, value) in after.items()} == known
        assert added_ids.tolist() == [after[key][0] for key in coming]
        assert all(after[key][0] == before[key][0] for key in known if key in before)
        new = [after[key][0] for key in coming if key not in before]
        assert new == free_ids(before, num_ids, removed=set(removed) - set(coming))[: len(new)]
        assert table.num_rows == len(known)
        every = [*known, *removed, *data.draw(st.lists(keys, max_size=5))]
        ids = table.ids_of(pa.array(every, key_type))
        assert ids.tolist() == [after[key][0] if key in after else -1 for key in every]
        assert [table.id_of(key) for key in every] == [
            None if row_id < 0 else row_id for row_id in ids.tolist()
        ]


def free_ids(before: dict[Any, tuple[int, Any]], num_ids: int, *, removed: set[Any]) -> list[int]:
    taken = {row_id for key, (row_id, _) in before.items() if key not in removed}
    return [row_id for row_id in range(num_ids + 99) if row_id not in taken]


def test_batches_are_whole_whatever_the_tables_are(tmp_path: Path):
    sizes = [1, 70_000, 0, 65_535, 65_536, 3]
    keys = [f"k{number}" for number in range(sum(sizes))]
    starts = np.cumsum([0, *sizes])
    write_rows(
        tmp_path,
        (
            pa.table({"key": keys[start : start + size]})
            for start, size in zip(starts[:-1].tolist(), sizes, strict=True)
        ),
    )
    table = RowTable(tmp_path)
    assert [table.batch(number).num_rows for number in range(table.num_batches)] == [
        65_536,
        65_536,
        65_536,
        sum(sizes) - 3 * 65_536,
    ]
    ids = random.Random(0).sample(range(len(keys)), 999)
    assert table.keys_of(np.array(ids)).to_pylist() == [keys[row_id] for row_id in ids]
    assert table.ids_of(pa.array([keys[row_id] for row_id in ids])).tolist() == ids


def test_unchanged_batches_of_a_large_table_stay(tmp_path: Path):
    keys = pa.array(np.arange(150_000) * 3)
    write_rows(tmp_path / "a", [pa.table({"key": keys, "price": keys})])
    first = RowTable(tmp_path / "a")
    ids = update_rows(
        tmp_path / "b",
        parent=first,
        removed_ids=np.array([70_000, 149_999]),
        added=pa.table({"key": [1, 2, 300_003, 4], "price": [10, 20, 30, 40]}),
    )
    assert ids.tolist() == [70_000, 149_999, 100_001, 150_000]
    table = RowTable(tmp_path / "b")
    assert (table.num_ids, table.num_rows) == (150_001, 150_001)
    assert table.columns_of([70_000, 100_001, 100_000]) == [
        {"price": 10},
        {"price": 30},
        {"price": 300_000},
    ]
    assert table.id_of(210_000) is None
    assert table.batch(0).equals(first.batch(0))


def test_columns_come_go_and_are_of_any_type(tmp_path: Path):
    day = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
    values: dict[str, Any] = {
        "brand": pa.array(["acme", None]).dictionary_encode(),
        "tags": pa.ListArray.from_arrays([0, 2, 3], pa.array(["a", "b", "a"]).dictionary_encode()),
        "price": pa.array([Decimal("1.20"), Decimal("-3.00")], pa.decimal128(9, 2)),
        "at": pa.array([day, None], pa.timestamp("us", "UTC")),
        "size": pa.array([{"w": 1, "h": 2.5}, None]),
        "stock": pa.array([True, False]),
        "blob": pa.array([b"\xff", b""]),
    }
    write_rows(tmp_path / "a", [pa.table({**values, "key": ["x", "y"]})])
    table = RowTable(tmp_path / "a")
    assert table.schema.field("brand").type == pa.string()
    assert table.columns_of([1, 0]) == [
        {name: column[row].as_py() for name, column in values.items()} for row in (1, 0)
    ]
    update_rows(
        tmp_path / "b",
        parent=table,
        removed_ids=np.zeros(0, np.int64),
        added=pa.table({"key": ["z", "x"], "brand": ["bolt", "coil"], "new": [1, 2]}),
    )
    assert RowTable(tmp_path / "b").columns_of([0, 1, 2]) == [
        {"brand": "coil", "new": 2},
        {"brand": None, "new": None},
        {"brand": "bolt", "new": 1},
    ]
    with pytest.raises(StoreError, match=r"columns .*brand string.* are not those of new rows"):
        update_rows(
            tmp_path / "c",
            parent=table,
            removed_ids=np.zeros(0, np.int64),
            added=pa.table({"key": ["z"], "brand": [1]}),
        )


@pytest.mark.parametrize("key_type", [pa.string(), pa.int64()])
def test_an_empty_table_is_one(tmp_path: Path, key_type: pa.DataType):
    columns = pa.schema({"key": key_type, "price": pa.int32()})
    write_rows(tmp_path / "a", [], columns=columns)
    table = RowTable(tmp_path / "a")
    assert (table.num_ids, table.num_rows, table.alive().tolist()) == (0, 0, [])
    assert (table.id_of("x"), table.id_of(1)) == (None, None)
    assert table.ids_of(pa.array([], key_type)).tolist() == []
    key = pa.array([7]).cast(key_type)
    ids = update_rows(
        tmp_path / "b",
        parent=table,
        removed_ids=np.zeros(0, np.int64),
        added=pa.table({"key": key, "price": [3]}),
    )
    table = RowTable(tmp_path / "b")
    assert ids.tolist() == [0]
    assert (table.key_of(0), table.alive().tolist()) == (key[0].as_py(), [1])
    write_rows(tmp_path / "c", [])
    assert RowTable(tmp_path / "c").key_type == pa.string()


def test_what_is_no_key_has_no_id(tmp_path: Path):
    write_rows(tmp_path / "s", [pa.table({"key": ["7", "", "é"]})])
    strings = RowTable(tmp_path / "s")
    assert [strings.id_of(key) for key in ("7", "", "é", 7, "\ud800", "e")] == [
        0,
        1,
        2,
        None,
        None,
        None,
    ]
    write_rows(tmp_path / "i", [pa.table({"key": [1, -(2**63)]})])
    integers = RowTable(tmp_path / "i")
    assert [integers.id_of(key) for key in (1, -(2**63), True, 2**63, "1")] == [0, 1] + [None] * 3


def test_a_key_twice_is_a_bug(tmp_path: Path):
    write_rows(tmp_path / "a", [pa.table({"key": ["x"]})])
    with pytest.raises(AssertionError):
        update_rows(
            tmp_path / "b",
            parent=RowTable(tmp_path / "a"),
            removed_ids=np.zeros(0, np.int64),
            added=pa.table({"key": ["y", "y"]}),
        )


def read_all(folder: Path) -> list[Any]:
    table = RowTable(folder)
    ids = np.arange(table.num_ids)
    keys = table.keys_of(ids)
    return [keys.to_pylist(), table.columns_of(ids), table.ids_of(keys), table.id_of("key 5")]


@pytest.mark.parametrize("name", ["rows.arrow", "hashes.npy"])
def test_a_cut_or_missing_file_is_damaged(tmp_path: Path, name: str):
    rows_of = pa.table({"key": [f"key {number}" for number in range(100)], "price": range(100)})
    write_rows(tmp_path, [rows_of])
    whole = (tmp_path / name).read_bytes()
    for num_bytes in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:num_bytes])
        with pytest.raises(StoreError, match=rf"{name}.* is damaged"):
            read_all(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(StoreError, match=rf"{name} is damaged or missing"):
        RowTable(tmp_path)


@settings(max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
):
    folder = tmp_path_factory.mktemp("flipped")
    keys = [f"key {number}" for number in range(20)]
    write_rows(folder, [pa.table({"key": keys, "name": keys})])
    path = folder / "rows.arrow"
    whole = bytearray(path.read_bytes())
    whole[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(whole)
    try:
        read_all(folder)
    except StoreError as error:
        assert "rows.arrow is damaged" in str(error)  # noqa: PT017 - many bits are of no account


def test_hashes_that_belong_to_other_rows_are_found_out(tmp_path: Path):
    write_rows(tmp_path / "a", [pa.table({"key": ["x"]})])
    write_rows(tmp_path / "b", [pa.table({"key": ["x", "y"]})])
    (tmp_path / "b" / "hashes.npy").replace(tmp_path / "a" / "hashes.npy")
    with pytest.raises(StoreError, match=r"1 rows, and hashes\.npy has 2"):
        RowTable(tmp_path / "a")


def test_a_full_disk_leaves_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot be written: .* free space"):
        write_rows(tmp_path / "file" / "rows", [pa.table({"key": ["x"]})])

    def tables() -> Iterator[pa.Table]:
        yield pa.table({"key": ["x"]})
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left on device"):
        write_rows(tmp_path / "rows", tables())
    assert list((tmp_path / "rows").iterdir()) == []
