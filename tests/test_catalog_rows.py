"""Single rows of real catalogs by their keys, in every layout of images."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import catalog_rows
from pipelines.catalog_rows import CatalogRows
from pipelines.errors import CatalogError
from pipelines.fetching.fetch_policy import FetchPolicy
from pipelines.snapshots import CatalogRecord
from tests.catalogs import write_rows


def record(folder: Path, **columns: str | None) -> CatalogRecord:
    roles = {"key": "key", "image": "image", "text": None, "version": None, "carry": None}
    return CatalogRecord(
        uri=str(folder), num_rows=0, num_keys=0, columns={**roles, **columns}, files={}
    )


def image_of(rows: CatalogRows, key: Any) -> Any:
    return rows.image_of(key, max_bytes=1000)


def test_each_row_of_several_files_and_groups_is_found(tmp_path: Path):
    rows = [{"key": f"k{n}", "image": f"picture {n}".encode()} for n in range(100)]
    found = CatalogRows(record(write_rows(tmp_path / "catalog", rows, num_files=3)))
    for row in rows:
        assert image_of(found, row["key"]) == row["image"]
    assert image_of(found, "nobody") is None
    assert image_of(found, 7) is None


def test_keys_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("pipelines.indexes.key_hashes.hash_content", lambda content: len(content))
    monkeypatch.setattr(catalog_rows, "hash_content", len)
    rows = [{"key": f"k{n:02}", "image": b"%d" % n} for n in range(40)]
    found = CatalogRows(record(write_rows(tmp_path / "catalog", rows)))
    assert [image_of(found, row["key"]) for row in rows] == [row["image"] for row in rows]


def test_integer_keys_nulls_and_repeats(tmp_path: Path):
    rows = [
        {"id": -5, "image": b"first"},
        {"id": None, "image": b"of no key"},
        {"id": 2**40, "image": None},
        {"id": -5, "image": b"second"},
    ]
    found = CatalogRows(record(write_rows(tmp_path / "catalog", rows), key="id"))
    assert image_of(found, -5) == b"first"
    assert image_of(found, 2**40) is None
    assert image_of(found, "-5") is None


def test_structs_and_uris_are_read_as_for_embedding(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"from a file")
    uri = (tmp_path / "a.png").as_uri()
    structs = [
        {"key": "bytes", "image": {"bytes": b"inside", "path": "gone.png"}},
        {"key": "path", "image": {"bytes": None, "path": uri}},
        {"key": "null", "image": None},
    ]
    schema = pa.schema(
        {"key": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    )
    fetch = FetchPolicy(allow=(str(tmp_path),))
    found = CatalogRows(
        record(write_rows(tmp_path / "structs", structs, schema=schema)), fetch=fetch
    )
    assert image_of(found, "bytes") == b"inside"
    assert image_of(found, "path") == b"from a file"
    assert image_of(found, "null") is None
    uris = [{"key": "there", "image": uri}, {"key": "gone", "image": f"{uri}.gone"}]
    found = CatalogRows(record(write_rows(tmp_path / "uris", uris)), fetch=fetch)
    assert found.image_of("there", max_bytes=4) == b"from "  # a byte more: the caller sees it
    assert image_of(found, "gone").reason == "fetch_failed"
    refused = CatalogRows(record(tmp_path / "uris"))
    assert image_of(refused, "there").reason == "fetch_refused"


def test_no_row_costs_more_than_a_bound(tmp_path: Path, monkeypatch):
    rows = [{"key": f"k{n}", "image": bytes([n]) * 100} for n in range(100)]
    found = CatalogRows(record(write_rows(tmp_path / "catalog", rows)))
    (size,) = [found._image_sizes(file.path) for file in found._catalog.files]
    assert all(num_bytes >= 100 * rows for num_bytes, rows in zip(size, found._sizes, strict=True))
    monkeypatch.setattr(catalog_rows, "MAX_READ_BYTES", 500)
    assert image_of(found, "k0") == rows[0]["image"]
    with pytest.raises(CatalogError, match="with smaller row groups"):
        image_of(found, f"k{found._sizes[0] - 1}")
    assert image_of(found, f"k{found._sizes[0]}") == rows[found._sizes[0]]["image"]


def test_a_catalog_without_images_or_of_other_columns(tmp_path: Path):
    folder = write_rows(tmp_path / "catalog", [{"key": "a", "text": "words"}])
    found = CatalogRows(record(folder, image=None, text="text"))
    assert not found.has_images
    assert image_of(found, "a") is None
    with pytest.raises(CatalogError, match="'image' is missing"):
        CatalogRows(record(folder))


def test_a_catalog_that_changes_is_never_taken_for_another_row(tmp_path: Path):
    rows = [{"key": f"k{n}", "image": b"%d" % n} for n in range(40)]
    folder = write_rows(tmp_path / "catalog", rows)
    found = CatalogRows(record(folder))
    write_rows(folder, rows[::-1])
    assert image_of(found, "k3") in (None, b"3")
    write_rows(folder, rows[:1])
    assert image_of(found, "k5") is None  # its row is not there
    for part in folder.iterdir():
        part.unlink()
    with pytest.raises(CatalogError):
        image_of(found, "k3")
