"""What names a plan, what an unfinished run of it left, and what of a catalog is read."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import schema
from pipelines.catalog import Catalog, CatalogConfig, open_catalog
from pipelines.ledger import Ledger
from pipelines.planning import (
    add_stored,
    catalog_record,
    fill,
    modalities_by_content,
    plan_id_of,
    staged_files,
)
from pipelines.snapshots import EngineRecord, Snapshot, StoredFile
from pipelines.store import Store
from pipelines.writing import write_table
from tests import stages_here
from tests.catalogs import write_rows
from tests.object_store import s3_bucket
from tests.stored import PLAN_ID, embeddings_file, make_snapshot

ENGINE = EngineRecord(engine_id="fp32-1", checkpoint="a", revision=None)
ROWS = [
    {"key": "a", "text": "one", "caption": "uno"},
    {"key": "b", "text": "two", "caption": "due"},
]


def opened(folder: Path, **columns: str) -> Catalog:
    return open_catalog(CatalogConfig(uri=str(folder), **columns))


def rejects_file(store: Store, key: str) -> StoredFile:
    """Write one file of one reject."""
    row: dict[str, Any] = {
        "key": key,
        "modality": "image",
        "stage": "decode",
        "reason": "null_image",
    }
    row |= {"source_file": "a.parquet", "source_row": 0}
    rows = pa.Table.from_pylist([row], schema=schema.rejects_schema(key_type=pa.string()))
    return write_table(rows, kind="rejects", modality="image", plan_id=PLAN_ID, store=store)


@pytest.fixture
def catalog_dir(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "catalog", ROWS)


def test_a_plan_is_named_by_catalog_files_columns_engine_and_settings(catalog_dir: Path):
    def plan(*, engine: str = "fp32-1", settings: tuple[str, ...] = (), **columns: str) -> str:
        record = EngineRecord(engine_id=engine, checkpoint="a", revision=None)
        return plan_id_of(opened(catalog_dir, **columns), engine=record, settings=settings)

    first = plan()
    assert plan() == first
    others = {
        plan(engine="fp32-2"),
        plan(settings=("float16",)),
        plan(text_column="caption"),
        plan(version_column="caption"),
    }
    assert len(others | {first}) == 5
    write_rows(catalog_dir, [*ROWS, {"key": "c", "text": "three", "caption": "tre"}])
    assert plan() not in others | {first}


def test_where_the_checkpoint_lies_does_not_name_the_plan(catalog_dir: Path):
    moved = EngineRecord(engine_id="fp32-1", checkpoint="/elsewhere", revision=None)
    catalog = opened(catalog_dir)
    assert plan_id_of(catalog, engine=ENGINE, settings=()) == plan_id_of(
        catalog, engine=moved, settings=()
    )


def test_rows_share_embeddings_where_a_fingerprint_is_all_of_a_row(catalog_dir: Path):
    assert modalities_by_content(opened(catalog_dir)) == ("text",)
    assert modalities_by_content(opened(catalog_dir, version_column="caption")) == ()
    config = CatalogConfig(uri=str(catalog_dir), carry_columns=("caption",))
    assert modalities_by_content(open_catalog(config)) == ()


def test_staged_files_are_those_of_the_plan_and_not_committed(tmp_path: Path):
    store = Store(str(tmp_path / "store"))
    assert staged_files(store, plan_id=PLAN_ID, committed=()) == []
    files = [
        embeddings_file(store, {"a": [1.0, 0.0], "b": [0.0, 1.0]}),
        embeddings_file(store, {"a": [1.0, 0.0]}, modality="text"),
    ]
    found = staged_files(store, plan_id=PLAN_ID, committed=())
    assert set(found) == set(files)
    assert staged_files(store, plan_id=PLAN_ID, committed=files[:1]) == files[1:]
    assert staged_files(store, plan_id="another", committed=()) == []


def test_files_that_another_process_adds_to_those_that_were_staged_are_read():
    with (
        s3_bucket() as bucket,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as elsewhere,
        Ledger(key_type=pa.string(), modalities=("image",)) as ledger,
    ):
        store = Store(f"{bucket}/store")

        def written(key: str) -> StoredFile:
            return elsewhere.submit(rejects_file, store, key).result()

        staged = written("a")
        assert staged_files(store, plan_id=PLAN_ID, committed=()) == [staged]
        added = written("b")
        add_stored(ledger, [added], store=store, staged=True)
        assert set(staged_files(store, plan_id=PLAN_ID, committed=())) == {staged, added}


def test_a_snapshot_remembers_its_catalog(catalog_dir: Path):
    catalog = opened(catalog_dir)
    record = catalog_record(catalog, num_keys=2)
    assert record.columns == {
        "key": "key",
        "image": None,
        "text": "text",
        "version": None,
        "carry": None,
    }
    assert (record.num_rows, record.num_keys) == (2, 2)
    assert record.files == {str(catalog_dir / "part-0.parquet"): catalog.files[0].identity}


def test_files_with_duplicate_keys_are_read_again_those_with_null_keys_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keys = [("a", None), ("b", "b2"), ("c", "b"), (None, "d")]
    rows = [{"key": key, "text": "t"} for pair in keys for key in pair]
    catalog_dir = write_rows(tmp_path / "catalog", rows, num_files=len(keys))
    catalog, store = opened(catalog_dir), Store(str(tmp_path / "store"))

    def filled(parent: Snapshot | None) -> pa.Table:
        with Ledger(key_type=pa.string(), modalities=("text",)) as ledger:
            fill(ledger, catalog, parent=parent, staged=(), store=store, num_cpus=1)
            return ledger.whole_row_rejects(key_type=pa.string())

    rejects = write_table(filled(None), kind="rejects", modality=None, plan_id=PLAN_ID, store=store)
    parent = dataclasses.replace(
        make_snapshot([rejects], modalities=("text",)), catalog=catalog_record(catalog, num_keys=4)
    )
    hashed: list[str] = []

    def noted(catalog: Catalog, *, paths: Sequence[str], num_cpus: float) -> Iterator[pa.Table]:
        hashed.extend(paths)
        return stages_here._hash(catalog, paths=paths, num_cpus=num_cpus)

    monkeypatch.setattr("pipelines.planning._hash", noted)
    again = filled(parent)
    assert sorted(again["reason"].to_pylist()) == ["duplicate_key", "null_key", "null_key"]
    assert hashed == [str(catalog_dir / "part-2.parquet")]
