"""What may not follow a snapshot: other engines, builds, backends, keys, columns, elements."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.backends.choice import Backend, Wanted
from pipelines.catalog import Catalog, CatalogConfig, open_catalog
from pipelines.engines import Execution
from pipelines.errors import StoreError
from pipelines.parent import EngineChange, check_parent, same_state
from pipelines.planning import catalog_record
from pipelines.schema import Decoder, EmbeddingDtype, WantedDecoder
from pipelines.snapshots import Snapshot
from pipelines.store import Store
from tests.catalogs import write_rows
from tests.stored import make_snapshot


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    rows = [{"key": "a", "text": "a word", "price": 1}]
    folder = write_rows(tmp_path / "catalog", rows)
    return open_catalog(CatalogConfig(uri=str(folder), carry_columns=("price",)))


@pytest.fixture
def parent(catalog: Catalog) -> Snapshot:
    snapshot = make_snapshot([], modalities=("text",))
    return dataclasses.replace(snapshot, catalog=catalog_record(catalog, num_keys=1))


def check(
    parent: Snapshot | None,
    catalog: Catalog,
    tmp_path: Path,
    *,
    backend: Backend = "onnxruntime",
    decoder: Decoder = "cpu",
    wanted_backend: Wanted = "auto",
    wanted_decoder: WantedDecoder = "auto",
    dtype: EmbeddingDtype = "float32",
    engine_change: EngineChange = "refuse",
    **engine: Any,
) -> None:
    record = make_snapshot([]).engine
    check_parent(
        parent,
        catalog=catalog,
        engine=dataclasses.replace(record, **engine),
        execution=Execution(backend=backend, decoder=decoder),
        wanted_backend=wanted_backend,
        wanted_decoder=wanted_decoder,
        dtype=dtype,
        store=Store(str(tmp_path / "store")),
        engine_change=engine_change,
    )


def test_the_same_again(parent: Snapshot, catalog: Catalog, tmp_path: Path) -> None:
    check(parent, catalog, tmp_path)
    check(None, catalog, tmp_path, engine_id="fp8-1", dtype="float16")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"engine_id": "fp8-1"}, "gives fp8-1"),
        ({"weights": "0" * 64}, "of another build of engine .*, with other weights"),
        ({"dtype": "float16"}, "float32 embeddings, float16 was asked for"),
        ({"backend": "torch"}, "by onnxruntime, here it would be torch, .* --backend torch mixes"),
        ({"decoder": "gpu"}, "decoded by cpu, here it would be gpu, .* --decode gpu mixes them"),
    ],
)
def test_what_changed_is_named(
    parent: Snapshot, catalog: Catalog, tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    with pytest.raises(StoreError, match=fault + ".*They never mix: name another --store"):
        check(parent, catalog, tmp_path, **change)


def test_another_backend_by_name(parent: Snapshot, catalog: Catalog, tmp_path: Path) -> None:
    check(parent, catalog, tmp_path, backend="torch", wanted_backend="torch")
    check(parent, catalog, tmp_path, decoder="gpu", wanted_decoder="gpu")


NIGHTLY = "or run `clipmill nightly`, which embeds all rows anew"


@pytest.mark.parametrize("engine", [{"engine_id": "fp8-1"}, {"weights": "0" * 64}])
def test_another_engine_may_embed_all_anew(
    parent: Snapshot, catalog: Catalog, tmp_path: Path, engine: dict[str, Any]
) -> None:
    with pytest.raises(StoreError, match=NIGHTLY):
        check(parent, catalog, tmp_path, **engine)
    # By another backend too: its rows stand beside none of the one before.
    check(parent, catalog, tmp_path, engine_change="re-embed", backend="torch", **engine)
    with pytest.raises(StoreError, match="float32 embeddings, float16 was asked for") as caught:
        check(parent, catalog, tmp_path, engine_change="re-embed", dtype="float16", **engine)
    assert NIGHTLY not in str(caught.value)


def test_the_same_engine_embeds_nothing_anew(
    parent: Snapshot, catalog: Catalog, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="embeddings by onnxruntime") as caught:
        check(parent, catalog, tmp_path, engine_change="re-embed", backend="torch")
    assert NIGHTLY not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"key_type": str(pa.int64())}, "keys of type int64, the catalog's are string"),
        ({"modalities": ("image", "text")}, "of each key, the catalog has"),
    ],
)
def test_what_the_snapshot_is_of(
    parent: Snapshot, catalog: Catalog, tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    with pytest.raises(StoreError, match=fault):
        check(dataclasses.replace(parent, **change), catalog, tmp_path)


def test_carried_columns(parent: Snapshot, catalog: Catalog, tmp_path: Path) -> None:
    bare = open_catalog(CatalogConfig(uri=catalog.config.uri))
    with pytest.raises(StoreError, match="carried columns price, None were asked for"):
        check(parent, bare, tmp_path)


def test_only_files_catalog_and_engine_make_another_state(parent: Snapshot) -> None:
    assert same_state(dataclasses.replace(parent, number=2, run_id="other"), parent)
    grown = dataclasses.replace(parent.catalog, num_keys=2)
    assert not same_state(dataclasses.replace(parent, catalog=grown), parent)
    other = dataclasses.replace(parent.engine, engine_id="fp8-1")
    assert not same_state(dataclasses.replace(parent, engine=other), parent)
