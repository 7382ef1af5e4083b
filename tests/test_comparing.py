"""A catalog beside a store, at a run's begin: what is due, and what an unfinished run left."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
from ray.data import DataContext

from pipelines import comparing, schema
from pipelines.catalog import CatalogConfig, open_catalog
from pipelines.cluster.placement import WorkerDemand
from pipelines.cluster.resources import Resources
from pipelines.cluster.watched_runs import PlacementCallback, placement_watched
from pipelines.comparing import compared
from pipelines.counts import KeyCounts
from pipelines.engines import Execution
from pipelines.planning import catalog_record
from pipelines.preparing import Preparation
from pipelines.snapshots import StoredFile
from pipelines.store import Store
from pipelines.writing import write_table
from tests.catalogs import write_rows
from tests.clusters import describe_cluster
from tests.stored import PLAN_ID, embeddings_file, make_snapshot

NONE = KeyCounts(
    **{field.name: 0 for field in dataclasses.fields(KeyCounts)}  # type: ignore[arg-type]
)


@pytest.fixture(autouse=True)
def _cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    describe_cluster(monkeypatch, {"CPU": 2.0})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def rejected(store: Store, key: str, *, reason: str, plan_id: str) -> StoredFile:
    row = {"key": key, "modality": "text", "stage": "decode", "reason": reason}
    row |= {"source_file": "a.parquet", "source_row": 0}
    rows = pa.Table.from_pylist([row], schema=schema.rejects_schema(key_type=pa.string()))
    return write_table(rows, kind="rejects", modality="text", plan_id=plan_id, store=store)


@pytest.fixture
def setting(tmp_path: Path, store: Store) -> Preparation:
    """Of five texts: `a` is embedded, `b` and `c` are rejected, `d` was embedded since."""
    rows = [{"key": key, "text": key} for key in "abcde"]
    catalog = open_catalog(CatalogConfig(uri=str(write_rows(tmp_path / "catalog", rows))))
    before = [
        embeddings_file(store, {"a": [1.0, 0.0]}, modality="text", plan_id="before"),
        rejected(store, "b", reason="fetch_failed", plan_id="before"),
        rejected(store, "c", reason="empty_text", plan_id="before"),
    ]
    parent = dataclasses.replace(
        make_snapshot(before, modalities=("text",)), catalog=catalog_record(catalog, num_keys=3)
    )
    embeddings_file(store, {"d": [0.0, 1.0]}, modality="text")
    return Preparation(
        catalog=catalog,
        store=store,
        engine=parent.engine,
        execution=Execution(backend="onnxruntime", decoder="cpu"),
        plan_id=PLAN_ID,
        parent=parent,
        base=parent,
    )


def counted(setting: Preparation, *retried: str) -> tuple[KeyCounts, list[str]]:
    """What is to be done, and keys of the files that an unfinished run left."""
    with compared(setting, resources=Resources(), retried=retried) as (ledger, staged):
        keys = ledger.counts().keys["text"]
    return keys, [file.path for file in staged]


def test_what_the_snapshot_before_and_an_unfinished_run_have_is_not_due(setting: Preparation):
    keys, staged = counted(setting)
    assert keys == dataclasses.replace(NONE, num_new=1, num_unchanged=3, num_staged=1)
    (path,) = staged
    assert path not in {file.path for file in setting.before}


def test_rejects_of_the_reasons_named_are_due_again(setting: Preparation):
    keys, _ = counted(setting, "fetch_failed")
    assert keys == dataclasses.replace(
        NONE, num_new=1, num_retried=1, num_unchanged=2, num_staged=1
    )


def test_where_all_is_embedded_anew_the_snapshot_before_says_nothing(setting: Preparation):
    keys, staged = counted(dataclasses.replace(setting, base=None))
    # All that lies under the plan's name counts.
    assert keys == dataclasses.replace(NONE, num_new=4, num_staged=1)
    assert len(staged) == 1


def test_ray_data_is_set_up_for_the_length_of_the_block(setting: Preparation):
    def is_watched() -> bool:
        return PlacementCallback in DataContext.get_current().execution_callback_classes

    def fails_within() -> None:
        with compared(setting, resources=Resources(), retried=()):
            assert is_watched()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails_within()
    assert not is_watched()


def test_what_reads_the_catalog_is_watched_for_a_place(
    setting: Preparation, monkeypatch: pytest.MonkeyPatch
):
    demands: list[WorkerDemand] = []

    def watched(wanted: list[WorkerDemand], **options: object):
        demands.extend(wanted)
        return placement_watched(wanted, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(comparing, "placement_watched", watched)
    with compared(setting, resources=Resources(io_cpus=0.5), retried=()):
        pass
    (demand,) = demands
    assert (demand.what, demand.resources) == ("reading the catalog", {"CPU": 0.5})
