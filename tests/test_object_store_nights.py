"""The same nights over S3 and over a local disk: the same snapshots, whoever reads them."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import nightly, snapshots
from pipelines.schema import MODALITIES
from pipelines.snapshots import Snapshot, StoredFile, read_snapshot
from pipelines.store import Store
from tests.catalogs import scene_rows
from tests.commands import command
from tests.night_process import night_process
from tests.object_store import s3_bucket

CATALOG_SCHEMA = pa.schema({"key": pa.string(), "image": pa.binary(), "text": pa.string()})


def first_rows() -> list[dict[str, Any]]:
    """36 rows, of which six have an image, a text or a key that cannot be embedded."""
    rows = scene_rows(36)
    rows[3]["image"] = rows[3]["image"][:60]
    rows[4]["image"] = b"not an image"
    rows[5]["text"] = None
    rows[6]["text"] = ""
    rows[7]["key"] = None
    rows[9]["key"] = rows[8]["key"]
    return rows


def second_rows() -> list[dict[str, Any]]:
    """The night after: changed, gone, come, moved, healed, and newly broken rows."""
    rows, others = first_rows(), scene_rows(46)[36:]
    rows[0]["text"], rows[1]["image"] = others[0]["text"], others[1]["image"]
    rows[4]["image"] = others[4]["image"]
    rows[10]["image"] = b"broken now"
    rows[12]["key"] = "under another key"
    rows[14]["image"], rows[15]["image"] = rows[15]["image"], rows[14]["image"]
    rows[16]["text"] = rows[17]["text"]
    return [*rows[:20], *rows[25:], others[8], others[9]]


def third_rows() -> list[dict[str, Any]]:
    """The first again, but for two rows."""
    rows = first_rows()
    return [{**rows[0], "text": "another text"}, *rows[2:]]


@dataclass(frozen=True)
class Place:
    """Where a catalog and its store lie."""

    uri: str
    nightly: Callable[[Sequence[str]], None]

    @property
    def store(self) -> Store:
        return Store(f"{self.uri}/store")

    def deliver(self, rows: Sequence[dict[str, Any]], name: str) -> None:
        """Put these rows in the place of the catalog's one file.

        In one row group, so that batches are the same each time, and embeddings to the last bit.
        """
        fs, root = fsspec.core.url_to_fs(f"{self.uri}/catalog")
        fs.makedirs(root, exist_ok=True)
        for path in fs.find(root):
            fs.rm(path)
        with fs.open(f"{root}/{name}.parquet", "wb") as file:
            pq.write_table(pa.Table.from_pylist(list(rows), schema=CATALOG_SCHEMA), file)

    def roll_back(self, number: int) -> None:
        words = ["rollback", str(number), "--store", self.store.uri]
        assert command(snapshots.main, words).code == 0

    def rows(self, file: StoredFile) -> pa.Table:
        with self.store.open(file.path) as opened:
            return pq.read_table(opened)

    def without_place(self, text: str | None) -> str | None:
        _, root = fsspec.core.url_to_fs(self.uri)
        return text and text.replace(root, "")


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint_dir: Path,
    engines_dir: Path,
    local_ray: None,
) -> Iterator[tuple[Place, Place]]:
    """A disk and a bucket after three nights and a rollback: four snapshots each."""
    model = ["--checkpoint", str(checkpoint_dir), "--engines", str(engines_dir)]

    def here(words: Sequence[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nightly, "ray_cluster", lambda *_, **__: contextlib.nullcontext())
            done = command(nightly.main, [*words, *model])
            assert done.code == 0, done.err

    # Whose Ray workers know the bucket from their environment.
    with s3_bucket() as bucket, night_process() as process:

        def in_a_process(words: Sequence[str]) -> None:
            done = process.night(*words, *model)
            assert done.code == 0, done.err

        made = (
            Place(str(tmp_path_factory.mktemp("disk")), here),
            Place(f"{bucket}/nights", in_a_process),
        )
        for place in made:
            words = ["--catalog", f"{place.uri}/catalog", "--store", place.store.uri]
            place.deliver(first_rows(), "a")
            place.nightly(words)
            place.deliver(second_rows(), "b")
            place.nightly(words)
            place.roll_back(1)
            place.deliver(third_rows(), "c")
            place.nightly(words)
        yield made


def in_all_places(of: Callable[[Place, Snapshot], Any], places: Sequence[Place]) -> Iterator[Any]:
    """What is found of each of the four snapshots, once it is seen to be the same everywhere."""
    for number in (1, 2, 3, 4):
        found = [of(place, read_snapshot(place.store, number)) for place in places]
        assert found[0] == found[1], f"snapshot {number}"
        yield found[0]


def embeddings(place: Place, snapshot: Snapshot) -> dict[tuple[str, str], tuple[bytes, bytes]]:
    """Key and modality -> bytes of the embedding, and fingerprint."""
    found = {}
    for file in snapshot.files_of("embeddings"):
        for row in place.rows(file).to_pylist():
            vector = pa.array(row["embedding"], pa.float32()).to_numpy().tobytes()
            assert (row["key"], row["modality"]) not in found
            found[row["key"], row["modality"]] = (vector, row["fingerprint"])
    return found


def rejects(place: Place, snapshot: Snapshot) -> set[tuple[Any, ...]]:
    return {
        tuple(
            place.without_place(value) if name in ("source_file", "detail") else value
            for name, value in row.items()
        )
        for file in snapshot.files_of("rejects")
        for row in place.rows(file).to_pylist()
    }


def test_the_snapshots_hold_the_same_bit_for_bit(places: tuple[Place, Place]):
    first, second, back, third = in_all_places(embeddings, places)
    assert back == first
    assert len(first) == 2 * 34 - 4, "of 34 keys two lack an image and two a text"
    moved = [(name, modality) for name, modality in second if name == "under another key"]
    assert len(moved) == 2
    assert [second[at][0] for at in moved] == [first["k0012", at[1]][0] for at in moved]
    assert len(third) == len(first) - 2


def test_the_same_rows_are_rejected_for_the_same_reasons(places: tuple[Place, Place]):
    first, second, back, third = in_all_places(rejects, places)
    assert back == first
    assert len(first) == len(second) == len(third) == 6


def test_the_same_plans_led_to_the_same_files(places: tuple[Place, Place]):
    def told(place: Place, snapshot: Snapshot) -> Any:
        lineage, catalog = snapshot.lineage, snapshot.catalog
        assert lineage is not None
        files = sorted(
            # Rejects name the files that they came from.
            (file.kind, str(file.modality), file.num_rows, file.kind == "rejects" or file.num_bytes)
            for file in snapshot.files
        )
        return (
            {name: dataclasses.asdict(keys) for name, keys in lineage.plan.items()},
            [(found.guard, found.modality, found.is_tripped) for found in lineage.measurements],
            (catalog.num_rows, catalog.num_keys, catalog.columns),
            (snapshot.parent, snapshot.restores, snapshot.engine, snapshot.modalities),
            files,
        )

    _, second, back, third = in_all_places(told, places)
    assert back[3][1] == 1
    expected = {"num_changed": 3, "num_moved": 3, "num_new": 2, "num_deleted": 6}
    assert second[0]["image"].items() >= expected.items()
    assert third[0]["text"].items() >= {"num_changed": 1, "num_new": 0, "num_deleted": 1}.items()


def test_duckdb_and_polars_read_the_same_rows(places: tuple[Place, Place]):
    """DuckDB by fsspec: its own reader of S3 is an extension that it has to fetch first."""

    def by_duckdb(place: Place, paths: list[str]) -> list[Any]:
        with duckdb.connect() as db:
            db.register_filesystem(fsspec.filesystem("s3"))
            return db.read_parquet(paths).order("key").fetchall()

    def by_polars(place: Place, paths: list[str]) -> list[Any]:
        options = None
        if place.uri.startswith("s3:"):
            endpoint = os.environ["AWS_ENDPOINT_URL"]
            options = {"aws_endpoint_url": endpoint, "aws_allow_http": "true"}
        return pl.read_parquet(paths, storage_options=options).sort("key").rows()

    for modality in MODALITIES:
        for read in (by_duckdb, by_polars):

            def rows(place: Place, snapshot: Snapshot) -> list[Any]:
                files = snapshot.files_of("embeddings", modality=modality)  # noqa: B023
                return read(place, [f"{place.store.uri}/{file.path}" for file in files])  # noqa: B023

            for found, snapshot in zip(in_all_places(rows, places), (1, 2, 3, 4), strict=True):
                expected = read_snapshot(places[0].store, snapshot)
                assert len(found) == expected.num_rows("embeddings", modality=modality) > 0
