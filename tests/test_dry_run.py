"""What a run would do, found out without a trace."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest

from engine.registry import Registry
from pipelines.catalog import CatalogConfig, open_catalog
from pipelines.dry_run import plan
from pipelines.embedding import EmbedConfig
from pipelines.engines import EngineChoice, Execution, chosen_engine
from pipelines.errors import StoreError
from pipelines.planning import catalog_record
from pipelines.snapshots import Snapshot, commit
from pipelines.store import Store
from tests.catalogs import write_rows
from tests.clusters import describe_cluster
from tests.stored import embeddings_file, make_snapshot


@pytest.fixture(autouse=True)
def _cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    describe_cluster(monkeypatch, {"CPU": 2.0})


@pytest.fixture
def config(tmp_path: Path, checkpoint_dir: Path) -> EmbedConfig:
    """Three texts, a store that is not there, and an engine that is not built."""
    rows = [{"key": key, "text": key} for key in "abc"]
    return EmbedConfig(
        catalog=CatalogConfig(uri=str(write_rows(tmp_path / "catalog", rows))),
        store_uri=str(tmp_path / "store"),
        engine=EngineChoice(checkpoint=str(checkpoint_dir), engines_uri=str(tmp_path / "engines")),
    )


def committed(config: EmbedConfig, *, engine_id: str | None = None) -> Snapshot:
    """A snapshot of the first text, of the same catalog file."""
    store, catalog = Store(config.store_uri), open_catalog(config.catalog)
    engine = chosen_engine(config.engine, registry=Registry(config.engine.engines_uri))
    file = embeddings_file(store, {"a": [1.0, 0.0]}, modality="text")
    snapshot = dataclasses.replace(
        make_snapshot([file], modalities=("text",), embedding_dim=2),
        engine=dataclasses.replace(engine, engine_id=engine_id or engine.engine_id),
        catalog=catalog_record(catalog, num_keys=1),
    )
    commit(store, snapshot)
    return snapshot


def written(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """All that a folder holds: path -> inode, bytes and time of the last write."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_of_an_empty_store_by_an_engine_that_is_not_built(config: EmbedConfig, tmp_path: Path):
    found = plan(config)
    assert found.parent is None
    assert found.execution == Execution(backend="onnxruntime", decoder="cpu")
    assert found.engine.engine_id.startswith("fp32-")
    assert (found.counts.num_keys, found.counts.num_due) == (3, {"text": 3})
    assert {path.name for path in tmp_path.iterdir()} == {"catalog"}


def test_beside_a_snapshot(config: EmbedConfig, tmp_path: Path):
    snapshot = committed(config)
    before = written(tmp_path)
    found = plan(config)
    assert (found.parent, found.engine) == (snapshot, snapshot.engine)
    keys = found.counts.keys["text"]
    assert (keys.num_new, keys.num_unchanged) == (2, 1)
    assert written(tmp_path) == before


def test_what_a_run_would_refuse_is_refused_and_what_it_may_do_anew_is_planned(config: EmbedConfig):
    committed(config, engine_id="fp32-other")
    with pytest.raises(StoreError, match="holds embeddings of engine fp32-other"):
        plan(config)
    anew = plan(dataclasses.replace(config, engine_change="re-embed"))
    assert anew.parent is not None
    assert anew.counts.num_due == {"text": 3}


def test_a_catalog_without_rows_is_no_error(config: EmbedConfig, tmp_path: Path):
    """A night's guards judge it."""
    empty = pa.schema({"key": pa.string(), "text": pa.string()})
    write_rows(tmp_path / "catalog", [], schema=empty)
    assert plan(config).counts.num_keys == 0
