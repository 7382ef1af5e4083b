"""What names a plan, and what an unfinished run of it left."""

from pathlib import Path

import pytest

from pipelines.catalog import Catalog, CatalogConfig, open_catalog
from pipelines.planning import catalog_record, modalities_by_content, plan_id_of, staged_files
from pipelines.snapshots import EngineRecord
from pipelines.store import Store
from tests.catalogs import write_rows
from tests.stored import PLAN_ID, embeddings_file

ENGINE = EngineRecord(engine_id="fp32-1", checkpoint="a", revision=None)
ROWS = [
    {"key": "a", "text": "one", "caption": "uno"},
    {"key": "b", "text": "two", "caption": "due"},
]


def opened(folder: Path, **columns: str) -> Catalog:
    return open_catalog(CatalogConfig(uri=str(folder), **columns))


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
