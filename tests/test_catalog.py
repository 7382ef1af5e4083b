"""Tests of pipelines/catalog.py."""

import gc
import os
import re
import threading
from collections.abc import Mapping
from datetime import datetime
from email.utils import formatdate
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.catalog import Catalog, CatalogConfig, check_has_rows, open_catalog
from pipelines.catalog_columns import ImageLayout
from pipelines.errors import CatalogError
from tests.closed_folders import close
from tests.object_store import s3_bucket

Columns = Mapping[str, Any]
PLAIN: Columns = {"key": ["a", "b"], "text": ["one", "two"]}


def write(path: Path, columns: Columns = PLAIN, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **options)
    return path


def opened(path: Path | str, **names: Any) -> Catalog:
    return open_catalog(CatalogConfig(uri=str(path), **names))


def names(catalog: Catalog) -> list[str]:
    return [file.path[len(catalog.root) + 1 :] for file in catalog.files]


def test_a_folder_that_may_not_be_listed_is_an_error_and_not_left_out(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet")
    write(tmp_path / "b/c.parquet")
    close(tmp_path / "b", monkeypatch)
    with pytest.raises(CatalogError, match=r"cannot be listed: .*Permission denied"):
        opened(tmp_path)


def test_a_single_file_is_a_catalog(tmp_path):
    path = write(tmp_path / "_any.parquet", row_group_size=1)
    catalog = opened(path)
    assert [file.path for file in catalog.files] == [str(path)]
    assert catalog.files[0].row_groups == (1, 1)
    assert catalog.files[0].num_bytes == path.stat().st_size
    assert catalog.num_rows == 2


def test_finds_nested_files_by_path_but_not_what_others_hide(tmp_path):
    shown = ["a.parquet", "b/c.parquet", "b/d/e.pq", "f.parquet"]
    hidden = ["_temporary/g.parquet", ".h.parquet", "_metadata.parquet", "b/.tmp/i.parquet"]
    for name in shown + hidden:
        write(tmp_path / "_run.1" / name)
    (tmp_path / "_run.1" / "_SUCCESS").write_text("")
    (tmp_path / "_run.1" / "readme.txt").write_text("not Parquet")
    catalog = opened(tmp_path / "_run.1")
    assert names(catalog) == shown
    assert catalog.num_rows == 8


def test_reads_any_file_system_and_names_by_the_letter(tmp_path):
    folder = f"{tmp_path.name}/cat#a?l*[o]g"
    write(tmp_path / "a.parquet")
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/{folder}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert names(opened(f"memory://{folder}")) == ["a.parquet"]


def test_an_object_store_tells_content_by_its_etag(tmp_path):
    with s3_bucket() as bucket:
        fs = fsspec.filesystem("s3")
        for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
            path = write(tmp_path / f"{name}.parquet", {"key": ["k"], "text": [text]})
            fs.pipe_file(f"{bucket}/cat#a?log/{name}.parquet", path.read_bytes())
        fs.pipe_file(f"{bucket}/cat#a?log2/d.parquet", b"of another catalog")
        catalog = opened(f"{bucket}/cat#a?log/")
        with pytest.raises(CatalogError, match=r"no \.parquet file"):
            opened(f"{bucket}/cat")
    assert names(catalog) == ["a.parquet", "b.parquet", "c.parquet"]
    one, same, other = (file.identity for file in catalog.files)
    assert one == same != other


def test_a_catalog_on_an_object_store_is_opened_again_once_a_file_was_replaced(tmp_path):
    with s3_bucket() as bucket:
        # With a cache of its own, like another process.
        another = fsspec.filesystem("s3", skip_instance_cache=True)
        catalogs = []
        for num_rows in (1, 2000):
            rows = {"key": list(range(num_rows)), "text": ["one"] * num_rows}
            path = write(tmp_path / "a.parquet", rows)
            another.pipe_file(f"{bucket}/catalog/a.parquet", path.read_bytes())
            catalogs.append(opened(f"{bucket}/catalog"))
    before, after = catalogs
    assert (before.num_rows, after.num_rows) == (1, 2000)
    assert before.files[0].identity != after.files[0].identity


def test_no_connection_is_an_error_of_the_catalog(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with pytest.raises(CatalogError, match="cannot be listed: Could not connect"):
        opened("s3://bucket-of-nobody/catalog")


KEY_TYPES = [
    (pa.string(), pa.string()),
    (pa.large_string(), pa.string()),
    (pa.string_view(), pa.string()),
    (pa.dictionary(pa.int32(), pa.string()), pa.string()),
    (pa.int64(), pa.int64()),
    (pa.int32(), pa.int64()),
    (pa.uint32(), pa.int64()),
    (pa.dictionary(pa.int8(), pa.int32()), pa.int64()),
]


@pytest.mark.parametrize(("stored", "expected"), KEY_TYPES, ids=str)
def test_keys_are_strings_or_integers(tmp_path, stored, expected):
    plain = stored.value_type if pa.types.is_dictionary(stored) else stored
    keys = pa.array(["7"] if expected == pa.string() else [7], plain)
    keys = keys.dictionary_encode().cast(stored) if plain != stored else keys
    assert opened(write(tmp_path / "a.parquet", {"key": keys, "text": ["t"]})).key_type == expected


@pytest.mark.parametrize(
    "type_", [pa.uint64(), pa.float64(), pa.bool_(), pa.binary(), pa.date32()], ids=str
)
def test_other_keys_are_refused(tmp_path, type_):
    path = write(tmp_path / "a.parquet", {"key": pa.nulls(1, type_), "text": ["t"]})
    expected = f"key column 'key' must be a string or an integer, is {type_} in {path}"
    with pytest.raises(CatalogError, match=re.escape(expected)):
        opened(path)


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
LAYOUTS = [
    (pa.binary(), ImageLayout.BYTES),
    (pa.large_binary(), ImageLayout.BYTES),
    (STRUCT, ImageLayout.STRUCT),
    (pa.struct({"bytes": pa.large_binary()}), ImageLayout.STRUCT),
    (pa.string(), ImageLayout.URI),
    (pa.large_string(), ImageLayout.URI),
]


@pytest.mark.parametrize(("type_", "layout"), LAYOUTS, ids=str)
def test_images_come_in_three_layouts(tmp_path, type_, layout):
    catalog = opened(write(tmp_path / "a.parquet", {"key": ["a"], "image": pa.nulls(1, type_)}))
    assert catalog.image_layout == layout
    assert (catalog.image_column, catalog.text_column) == ("image", None)
    assert catalog.modalities == ("image",)


@pytest.mark.parametrize(
    "type_", [pa.int64(), pa.struct({"path": pa.string()}), pa.list_(pa.uint8())], ids=str
)
def test_other_images_are_refused(tmp_path, type_):
    path = write(tmp_path / "a.parquet", {"key": ["a"], "image": pa.nulls(1, type_)})
    with pytest.raises(CatalogError, match=r"image column 'image' must be binary, struct\{bytes"):
        opened(path)


def test_columns_have_the_names_that_the_config_gives(tmp_path):
    columns = {"id": [1], "photo": [b"x"], "title": ["t"], "etag": ["v1"], "price": [1.5]}
    catalog = opened(
        write(tmp_path / "a.parquet", columns),
        key_column="id",
        image_column="photo",
        text_column="title",
        version_column="etag",
        carry_columns=("price", "id"),
    )
    assert (catalog.image_column, catalog.text_column) == ("photo", "title")
    assert catalog.modalities == ("image", "text")
    assert catalog.carried == (pa.field("price", pa.float64()), pa.field("id", pa.int64()))


@pytest.mark.parametrize(("left_out", "kept"), [("image", "text"), ("text", "image")])
def test_a_modality_is_left_out_on_request(tmp_path, left_out, kept):
    path = write(tmp_path / "a.parquet", {"key": ["a"], "image": [b"x"], "text": ["t"]})
    assert opened(path, **{f"{left_out}_column": "none"}).modalities == (kept,)


def test_all_faults_are_told_at_once_with_the_columns_there(tmp_path):
    path = write(tmp_path / "a.parquet", {"sku": ["a"], "image": [1], "text": [2], "etag": [b"x"]})
    with pytest.raises(CatalogError) as error:
        opened(path, version_column="etag", carry_columns=("price",))
    message = str(error.value)
    for fault in (
        f"key column 'key' is missing in {path}",
        "image column 'image' must be",
        "text column 'text' must be a string, is int64",
        "version column 'etag' must be",
        "carried column 'price' is missing",
        "columns there: etag (binary), image (int64), sku (string), text (int64)",
    ):
        assert fault in message


def test_neither_image_nor_text_is_a_fault(tmp_path):
    path = write(tmp_path / "a.parquet", {"key": ["a"], "photo": [b"x"]})
    with pytest.raises(CatalogError, match=r"no column 'image' or 'text'.*--image-column"):
        opened(path)


def test_files_must_agree(tmp_path):
    write(tmp_path / "a.parquet", {"key": ["a"], "text": ["t"]})
    write(tmp_path / "b.parquet", {"key": [1], "text": ["t"]})
    write(tmp_path / "c.parquet", {"key": [2]})
    with pytest.raises(CatalogError) as error:
        opened(tmp_path)
    message = str(error.value)
    assert "key column 'key' differs between files: string in" in message
    assert f"int64 in {tmp_path}/b.parquet and 1 more files" in message
    assert f"text column 'text' is missing in {tmp_path}/c.parquet" in message


def test_files_may_store_one_type_in_several_ways(tmp_path):
    write(tmp_path / "a.parquet", {"key": pa.array(["a"]), "text": ["t"]})
    write(tmp_path / "b.parquet", {"key": pa.array(["b"], pa.large_string()), "text": ["t"]})
    write(tmp_path / "c.parquet", {"key": pa.array(["c"]).dictionary_encode(), "text": ["t"]})
    assert opened(tmp_path).key_type == pa.string()


FIRST_SECOND = 1_700_000_000


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


NOON = datetime(2026, 3, 1, 12)


@pytest.mark.parametrize(
    "versions",
    [
        [pa.array(["1"]), pa.array(["1"], pa.large_string()), pa.array(["1"]).dictionary_encode()],
        [pa.array([1], pa.int32()), pa.array([1], pa.int64()), pa.array([1.0])],
        [pa.array([NOON], pa.timestamp("us")), pa.array([NOON], pa.timestamp("ns", "UTC"))],
    ],
    ids=["string", "number", "timestamp"],
)
def test_files_may_store_versions_in_several_ways_too(tmp_path, versions):
    for number, of_file in enumerate(versions):
        columns = {"key": [f"k{number}"], "text": ["t"], "v": of_file}
        write(tmp_path / f"{number}.parquet", columns)
    assert opened(tmp_path, version_column="v").num_rows == len(versions)
    write(tmp_path / "other.parquet", {"key": ["a"], "text": ["t"], "v": [NOON.date()]})
    with pytest.raises(CatalogError, match=r"version column 'v' differs between files: .*date32"):
        opened(tmp_path, version_column="v")


def test_a_column_that_is_there_twice_is_a_fault(tmp_path):
    table = pa.table([pa.array(["a"])] * 3, names=["key", "key", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CatalogError, match="key column 'key' is there more than once"):
        opened(tmp_path)


def test_footers_are_not_held(tmp_path):
    for number in range(5):
        write(tmp_path / f"{number}.parquet", row_group_size=1)
    gc.collect()
    gc.disable()  # or it would free what is held in cycles
    try:
        catalog = opened(tmp_path)
        held = [found for found in gc.get_objects() if type(found) is pq.FileMetaData]
    finally:
        gc.enable()
    assert (catalog.num_rows, held) == (10, [])


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_a_truncated_file_is_named(tmp_path, num_bytes):
    write(tmp_path / "a.parquet")
    bad = write(tmp_path / "b.parquet")
    bad.write_bytes(bad.read_bytes()[:num_bytes])
    with pytest.raises(CatalogError, match=f"{bad}: not a whole Parquet file"):
        opened(tmp_path)


@pytest.mark.parametrize("name", [".", "nowhere", "nowhere.parquet"])
def test_no_files_are_an_error(tmp_path, name):
    with pytest.raises(CatalogError, match=r"no \.parquet file there"):
        opened(tmp_path / name)


def test_files_without_rows_are_an_error(tmp_path):
    empty = {"key": pa.array([], pa.string()), "text": pa.array([], pa.string())}
    write(tmp_path / "a.parquet", empty)
    write(tmp_path / "b.parquet", empty)
    with pytest.raises(CatalogError, match="2 Parquet files, none has a row"):
        check_has_rows(opened(tmp_path))
    write(tmp_path / "c.parquet")
    check_has_rows(opened(tmp_path))
    assert opened(tmp_path).num_rows == 2


def test_an_unknown_kind_of_catalog_is_refused():
    with pytest.raises(CatalogError, match="nope"):
        opened("nope://catalog")


def test_identity_changes_with_the_content_and_only_with_it(tmp_path):
    path = write(tmp_path / "a.parquet")
    os.utime(path, ns=(10**18, 10**18))
    before = opened(path).files[0].identity
    assert opened(tmp_path).files[0].identity == before

    longer = write(path, {"key": ["a", "b"], "text": ["one", "another text"]})
    os.utime(longer, ns=(10**18, 10**18))
    assert opened(path).files[0].identity != before

    write(path)
    os.utime(path, ns=(10**18, 10**18 + 10**6))
    assert opened(path).files[0].identity != before


def test_identity_in_memory_changes_with_the_content(tmp_path):
    fs = fsspec.filesystem("memory")
    identities = set()
    for text in ("one", "two"):
        content = write(tmp_path / "a.parquet", {"key": ["a"], "text": [text]}).read_bytes()
        fs.pipe_file(f"/{tmp_path.name}/a.parquet", content)
        identities.add(opened(f"memory://{tmp_path.name}").files[0].identity)
    assert len(identities) == 2


def test_over_http_files_are_told_by_their_headers(tmp_path):
    path = write(tmp_path / "catalog/a.parquet")
    os.utime(path, (FIRST_SECOND, FIRST_SECOND))
    handler = partial(SilentHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/catalog/"
        files = [opened(f"{uri}{name}").files for name in ("", "a.parquet")]
        server.shutdown()
    (in_folder,), (alone,) = files
    assert in_folder == alone
    assert alone.identity == f"{path.stat().st_size}-{formatdate(FIRST_SECOND, usegmt=True)}"


class Listing(MemoryFileSystem):
    """Describes its files as another file system does."""

    protocol = "listing"
    stamp: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("listing://"))

    def find(self, path: str, *args: Any, **options: Any) -> Any:
        return {name: self.info(name) for name in super().find(path)}

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        info = super().info(path, **options)
        return {"name": path, "size": info["size"], "type": info["type"], **self.stamp}


@pytest.mark.parametrize(
    "name", ["ETag", "modificationTime", "modify", "last_modified", "last_write_time", "updated"]
)
def test_identity_is_of_whatever_a_file_system_tells_and_never_of_size_alone(
    tmp_path, name, monkeypatch
):
    fsspec.register_implementation("listing", Listing, clobber=True)
    content = write(tmp_path / "a.parquet").read_bytes()
    fsspec.filesystem("listing").pipe_file(f"/{tmp_path.name}/a.parquet", content)
    identities = set()
    for stamp in (1, 2):
        monkeypatch.setattr(Listing, "stamp", {name: stamp, "created": None})
        identities.add(opened(f"listing://{tmp_path.name}").files[0].identity)
    assert identities == {f"{len(content)}-1", f"{len(content)}-2"}
    monkeypatch.setattr(Listing, "stamp", {})
    with pytest.raises(
        CatalogError, match=r"a\.parquet: its file system \(listing\) tells neither"
    ):
        opened(f"listing://{tmp_path.name}")


@pytest.mark.parametrize("name", ["embedding", "source_row", "text_wanted", "key"])
def test_carried_columns_cannot_take_our_names(name):
    with pytest.raises(ValueError, match=f"carry column '{name}'"):
        CatalogConfig(uri="catalog", carry_columns=(name,))


def test_config_refuses_an_empty_uri_and_a_column_carried_twice():
    with pytest.raises(ValueError, match="uri is empty"):
        CatalogConfig(uri="")
    with pytest.raises(ValueError, match="named twice"):
        CatalogConfig(uri="catalog", carry_columns=("price", "price"))
