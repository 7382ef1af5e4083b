"""A snapshot as plain Parquet: what other programs read of the files that it lists."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest

from jobs import snapshots
from pipelines.snapshots import commit
from pipelines.store import Store
from tests.stored import embeddings_file, make_snapshot

VECTORS = {"a": [1, 0, 0, 0], "b": [0, 1, 0, 0], "c": [0, 0, 0.6, 0.8]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two snapshots; the second carries one file over, and a file of no snapshot lies beside."""
    store = Store(str(tmp_path / "store"))
    first = embeddings_file(store, {"a": VECTORS["a"]})
    text = embeddings_file(store, {"a": VECTORS["c"]}, modality="text")
    dead = embeddings_file(store, {"b": VECTORS["a"]})
    commit(store, make_snapshot([first, text, dead], modalities=("image", "text")))
    second = embeddings_file(store, {"b": VECTORS["b"], "c": VECTORS["c"]})
    embeddings_file(store, {"d": VECTORS["a"]})
    commit(store, make_snapshot([first, text, second], number=2, modalities=("image", "text")))
    return store


def listed(store: Store, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert snapshots.main(["files", "--store", store.uri, *options]) == 0
    return capsys.readouterr().out.splitlines()


READERS = {
    "duckdb": lambda files: duckdb.read_parquet(files).df(),
    "polars": lambda files: pl.read_parquet(files).to_pandas(),
    "pandas": lambda files: pd.concat(map(pd.read_parquet, files)),
}


@pytest.mark.parametrize("name", READERS)
def test_other_programs_read_the_rows_of_a_snapshot(
    store: Store, capsys: pytest.CaptureFixture[str], name: str
):
    rows = READERS[name](listed(store, capsys, "--modality", "image"))
    assert sorted(rows["key"]) == ["a", "b", "c"]
    for key, vector in zip(rows["key"], rows["embedding"], strict=True):
        assert np.array_equal(np.asarray(vector, np.float32), np.float32(VECTORS[key]))
    assert set(rows["modality"]) == {"image"}


def test_the_manifest_alone_tells_the_files(store: Store, capsys: pytest.CaptureFixture[str]):
    files = json.loads((Path(store.uri) / "snapshots" / "00000002.json").read_text())["files"]
    expected = [
        f"{store.uri}/{file['path']}"
        for file in files
        if (file["kind"], file["modality"]) == ("embeddings", "image")
    ]
    assert listed(store, capsys, "--modality", "image") == expected


def test_any_snapshot_kind_and_modality(store: Store, capsys: pytest.CaptureFixture[str]):
    assert len(listed(store, capsys)) == 3
    assert len(listed(store, capsys, "--modality", "text")) == 1
    assert listed(store, capsys, "--kind", "rejects") == []
    before = listed(store, capsys, "1", "--modality", "image")
    assert sorted(duckdb.read_parquet(before).df()["key"]) == ["a", "b"]
    assert snapshots.main(["files", "--store", store.uri, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
