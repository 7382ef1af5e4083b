"""Tests of pipelines/reading.py, without a cluster: its read tasks are called here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import reading
from pipelines.catalog import Catalog, CatalogConfig, open_catalog
from pipelines.errors import CatalogError
from pipelines.reading import ROWS_PER_READ, CatalogDatasource, RowGroupRows, all_rows
from tests.meters import ListMeter
from tests.object_store import Unreliable, unreliable_bucket


def write(path: Path, columns: dict[str, Any], *, row_group_size: int = 4) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def opened(path: Path | str, **names: Any) -> Catalog:
    return open_catalog(CatalogConfig(uri=str(path), **names))


def read(catalog: Catalog, pieces: Any = None, **options: Any) -> pa.Table:
    """All rows of the pieces, or of the catalog, as one table."""
    if pieces is None:
        pieces = all_rows(catalog, paths=[file.path for file in catalog.files])
    options.setdefault("content", catalog.modalities)
    source = CatalogDatasource(catalog, pieces=pieces, **options)
    return pa.concat_tables([table for task in source.get_read_tasks(1) for table in task()])


def ten_rows(tmp_path: Path) -> Catalog:
    """Row groups of 4, 4 and 2 rows."""
    columns = {"key": [f"k{row}" for row in range(10)], "text": [f"t{row}" for row in range(10)]}
    return opened(write(tmp_path / "a.parquet", columns))


@pytest.mark.parametrize(
    "images",
    [
        pa.array([b"one", None], pa.binary()),
        pa.array([b"one", None], pa.large_binary()),
        pa.array([b"one", None], pa.binary()).dictionary_encode(),
        pa.array([{"bytes": b"one"}, {"bytes": None}], pa.struct({"bytes": pa.binary()})),
        pa.array(
            [{"bytes": b"one", "path": None}, None],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        ),
    ],
    ids=lambda images: str(images.type),
)
def test_bytes_have_one_form_whatever_the_layout(tmp_path, images):
    catalog = opened(write(tmp_path / "a.parquet", {"key": ["a", "b"], "image": images}))
    table = read(catalog)
    assert table["image"].type == pa.large_binary()
    assert table["image"].to_pylist() == [b"one", None]
    assert table["image_uri"].type == pa.binary()
    assert table["image_uri"].to_pylist() == [None, None]
    assert table["image_wanted"].to_pylist() == [True, True]
    assert table.column_names == [
        *("key", "image", "image_uri", "source_file", "source_row", "image_wanted")
    ]


def test_a_struct_gives_bytes_and_path_as_they_are(tmp_path):
    images = [
        {"bytes": b"one", "path": "one.jpg"},
        {"bytes": None, "path": "https://example.com/two.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    catalog = opened(write(tmp_path / "a.parquet", {"key": list("abcd"), "image": images}))
    table = read(catalog)
    assert table["image"].to_pylist() == [b"one", None, None, None]
    assert table["image_uri"].to_pylist() == [
        b"one.jpg",
        b"https://example.com/two.jpg",
        None,
        None,
    ]


def test_a_path_that_is_not_utf8_does_not_stop_the_reading(tmp_path):
    paths = pa.array([b"caf\xe9.jpg", b"fine.jpg"]).view(pa.string())
    images = pa.StructArray.from_arrays([pa.array([b"one", None]), paths], ["bytes", "path"])
    table = read(opened(write(tmp_path / "a.parquet", {"key": ["a", "b"], "image": images})))
    assert table["image"].to_pylist() == [b"one", None]
    assert table["image_uri"].to_pylist() == [b"caf\xe9.jpg", b"fine.jpg"]
    table = read(opened(write(tmp_path / "b.parquet", {"key": ["a", "b"], "image": paths})))
    assert table["image_uri"].to_pylist() == [b"caf\xe9.jpg", b"fine.jpg"]


@pytest.mark.parametrize("type_", [pa.int64(), pa.list_(pa.uint8())], ids=str)
def test_a_path_that_is_no_text_is_none(tmp_path, type_):
    images = pa.array([{"bytes": b"one"}], pa.struct({"bytes": pa.binary(), "path": type_}))
    table = read(opened(write(tmp_path / "a.parquet", {"key": ["a"], "image": images})))
    assert table["image_uri"].to_pylist() == [None]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()], ids=str)
def test_uris_are_not_bytes(tmp_path, type_):
    uris = pa.array(["https://example.com/1.jpg", None], type_)
    table = read(opened(write(tmp_path / "a.parquet", {"key": ["a", "b"], "image": uris})))
    assert table["image"].to_pylist() == [None, None]
    assert table["image_uri"].to_pylist() == [b"https://example.com/1.jpg", None]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (pa.array(["a", None], pa.large_string()), pa.array(["a", None])),
        (pa.array(["a", None], pa.string_view()), pa.array(["a", None])),
        (pa.array(["a", None]).dictionary_encode(), pa.array(["a", None])),
        (pa.array([3, None], pa.int8()), pa.array([3, None], pa.int64())),
        (pa.array([3, None], pa.int32()).dictionary_encode(), pa.array([3, None], pa.int64())),
    ],
    ids=lambda array: str(array.type),
)
def test_keys_are_string_or_int64(tmp_path, stored, expected):
    catalog = opened(write(tmp_path / "a.parquet", {"key": stored, "text": ["x", "y"]}))
    assert read(catalog)["key"].combine_chunks() == expected


def test_texts_versions_and_carried_columns_come_along(tmp_path):
    columns = {
        "sku": [1, 2],
        "title": pa.array(["x", None]).dictionary_encode(),
        "etag": [7, None],
        "price": [1.5, None],
        "unread": ["p", "q"],
    }
    catalog = opened(
        write(tmp_path / "a.parquet", columns),
        key_column="sku",
        text_column="title",
        version_column="etag",
        carry_columns=("price", "sku"),
    )
    table = read(catalog).drop(["source_file", "source_row", "text_wanted"])
    assert table.to_pydict() == {
        "key": [1, 2],
        "version": ["7", None],
        "text": [b"x", None],
        "price": [1.5, None],
        "sku": [1, 2],
    }


def test_without_content_only_keys_are_read(tmp_path):
    columns = {"key": ["a"], "text": ["x"], "price": [1]}
    catalog = opened(write(tmp_path / "a.parquet", columns), carry_columns=("price",))
    assert read(catalog, content=()).column_names == ["key", "source_file", "source_row"]


class Shelf:
    """A catalog of one file of 100 images on an object store, and what is fetched of it."""

    image_bytes = 40_000

    def __init__(self, bucket: str, traffic: Unreliable) -> None:
        self.uri, self.traffic = f"{bucket}/catalog", traffic
        images = [np.random.default_rng(0).bytes(self.image_bytes)] * 100
        table = pa.table({"key": list(range(100)), "image": images, "text": ["t"] * 100})
        fs, path = fsspec.url_to_fs(f"{self.uri}/a.parquet")
        with fs.open(path, "wb") as file:
            # Pages of ten rows, as of writers that keep to a page size.
            pq.write_table(table, file, use_dictionary=False, write_batch_size=10)

    def fetched(self, do: Callable[[], object]) -> tuple[int, int]:
        """Bytes and requests."""
        before = self.traffic.num_bytes, self.traffic.num_requests
        do()
        return self.traffic.num_bytes - before[0], self.traffic.num_requests - before[1]


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    with unreliable_bucket(seed=0) as (bucket, traffic):
        yield Shelf(bucket, traffic)


# A footer is looked for in the last 64 KiB.
FOOTER_BYTES = 70_000


def test_of_a_file_on_an_object_store_no_more_is_fetched_than_is_read(shelf: Shelf):
    num_bytes, _ = shelf.fetched(lambda: opened(shelf.uri))
    assert num_bytes < FOOTER_BYTES
    catalog = opened(shelf.uri)
    num_bytes, num_requests = shelf.fetched(lambda: read(catalog, content=()))
    assert num_bytes < FOOTER_BYTES
    assert num_requests <= 5
    num_bytes, num_requests = shelf.fetched(lambda: read(catalog))
    assert num_bytes < 100 * shelf.image_bytes + FOOTER_BYTES
    assert num_requests <= 10


def test_a_row_group_is_not_held_whole(shelf: Shelf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "ROWS_PER_READ", 5)
    monkeypatch.setattr(reading, "BYTES_PER_READ", 2 * shelf.image_bytes)
    catalog = opened(shelf.uri)
    pieces = all_rows(catalog, paths=[catalog.files[0].path])
    source = CatalogDatasource(catalog, pieces=pieces, content=("image",))
    (task,) = source.get_read_tasks(1)
    num_bytes, _ = shelf.fetched(lambda: next(iter(task())))
    assert num_bytes < 100 * shelf.image_bytes / 2


def test_every_row_has_its_number_within_the_file(tmp_path):
    table = read(ten_rows(tmp_path))
    assert table["source_row"].to_pylist() == list(range(10))
    assert table["key"].to_pylist() == [f"k{row}" for row in range(10)]
    assert set(table["source_file"].to_pylist()) == {str(tmp_path / "a.parquet")}


def test_rows_are_numbered_on_beyond_one_batch(tmp_path):
    num_rows = 2 * ROWS_PER_READ + 10
    columns = {"key": list(range(num_rows)), "text": ["t"] * num_rows}
    path = write(tmp_path / "a.parquet", columns, row_group_size=ROWS_PER_READ + 5)
    catalog = opened(path)
    assert read(catalog)["source_row"].to_pylist() == list(range(num_rows))
    chosen = np.array([ROWS_PER_READ - 1, ROWS_PER_READ, ROWS_PER_READ + 4])
    piece = RowGroupRows(
        path=str(path),
        row_group=0,
        first_row=0,
        rows=chosen,
        wanted={"text": np.array([True, False, True])},
    )
    table = read(catalog, [piece])
    assert table["key"].to_pylist() == chosen.tolist()
    assert table["source_row"].to_pylist() == chosen.tolist()
    assert table["text_wanted"].to_pylist() == [True, False, True]


def test_reads_only_the_files_that_are_named(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.parquet", {"key": [name], "text": ["t"]})
    catalog = opened(tmp_path)
    pieces = all_rows(catalog, paths=[str(tmp_path / "c.parquet"), str(tmp_path / "a.parquet")])
    assert read(catalog, pieces)["key"].to_pylist() == ["a", "c"]


def test_chosen_rows_of_a_later_row_group_and_what_is_wanted_of_each(tmp_path):
    catalog = ten_rows(tmp_path)
    piece = RowGroupRows(
        path=catalog.files[0].path,
        row_group=1,
        first_row=4,
        rows=np.array([4, 6, 7]),
        wanted={"text": np.array([True, False, True])},
    )
    table = read(catalog, [piece])
    assert table.drop(["source_file"]).to_pydict() == {
        "key": ["k4", "k6", "k7"],
        "text": [b"t4", b"t6", b"t7"],
        "source_row": [4, 6, 7],
        "text_wanted": [True, False, True],
    }


def test_a_task_for_each_row_group(tmp_path):
    catalog = ten_rows(tmp_path)
    pieces = list(all_rows(catalog, paths=[catalog.files[0].path]))
    source = CatalogDatasource(catalog, pieces=pieces, content=("text",))
    tasks = source.get_read_tasks(1)
    assert [table["key"].to_pylist() for task in tasks for table in task()] == [
        ["k0", "k1", "k2", "k3"],
        ["k4", "k5", "k6", "k7"],
        ["k8", "k9"],
    ]
    assert source.estimate_inmemory_data_size() is None


def test_the_meter_counts_rows_and_bytes(tmp_path):
    meter = ListMeter()
    table = read(ten_rows(tmp_path), meter=meter)
    assert sum(num_rows for num_rows, _ in meter.batches) == 10
    assert 0 < sum(num_bytes for _, num_bytes in meter.batches) <= table.nbytes


def test_columns_of_the_catalog_that_are_named_like_ours_cause_no_confusion(tmp_path):
    columns = {
        "source_row": ["k0", "k1"],
        "text_wanted": ["a text", "another"],
        "key": [b"first", b"second"],
        "version": [8, 9],
        "source_file": [1, 2],
        "text": ["unread", "unread"],
    }
    catalog = opened(
        write(tmp_path / "a.parquet", columns),
        key_column="source_row",
        text_column="text_wanted",
        image_column="key",
        version_column="source_file",
    )
    assert read(catalog).to_pydict() == {
        "key": ["k0", "k1"],
        "version": ["1", "2"],
        "image": [b"first", b"second"],
        "image_uri": [None, None],
        "text": [b"a text", b"another"],
        "source_file": [str(tmp_path / "a.parquet")] * 2,
        "source_row": [0, 1],
        "image_wanted": [True, True],
        "text_wanted": [True, True],
    }


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def overwrite_pages(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])


def drop_row_groups(path: Path) -> None:
    write(path, {"key": ["k"], "text": ["t"]})


def drop_column(path: Path) -> None:
    write(path, {"key": [str(row) for row in range(10)]})


def change_type(path: Path) -> None:
    write(path, {"key": [f"k{row}" for row in range(10)], "text": [{"a": 1}] * 10})


@pytest.mark.parametrize(
    "damage", [remove, truncate, overwrite_pages, drop_row_groups, drop_column, change_type]
)
def test_a_file_damaged_after_the_catalog_was_opened_is_named(tmp_path, damage):
    catalog = ten_rows(tmp_path)
    pieces = list(all_rows(catalog, paths=[catalog.files[0].path]))[1:]
    damage(tmp_path / "a.parquet")
    with pytest.raises(
        CatalogError, match=r"a\.parquet: row group 1 cannot be read .* run the same command again"
    ):
        read(catalog, pieces)


def test_keys_that_are_not_utf8_are_an_error_of_the_catalog_and_texts_are_passed_on(tmp_path):
    damaged = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    catalog = opened(write(tmp_path / "a.parquet", {"key": damaged, "text": ["a", "b"]}))
    with pytest.raises(CatalogError, match="UTF8"):
        read(catalog)
    catalog = opened(write(tmp_path / "b.parquet", {"key": ["a", "b"], "text": damaged}))
    assert read(catalog)["text"].to_pylist() == [b"fine", b"\xff\xfe"]
