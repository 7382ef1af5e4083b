"""Tests of pipelines/copying.py, with a real ledger and real files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import schema
from pipelines.copying import COPY_THREADS, copy_embeddings
from pipelines.errors import StoreError
from pipelines.ledger import Ledger
from pipelines.schema import Modality
from pipelines.snapshots import StoredFile
from pipelines.store import Store
from tests.stored import embeddings_file, fingerprint

Key = str | int


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def ledger_of(
    catalog: Mapping[Key, str],
    files: Sequence[StoredFile],
    *,
    store: Store,
    modality: Modality = "image",
) -> Ledger:
    """A ledger of key -> content, and of stored files whose contents are their keys in words."""
    key_type = pa.array(list(catalog)).type
    ledger = Ledger(key_type=key_type, modalities=[modality], by_content=[modality])
    rows = {
        "source_file": ["a"] * len(catalog),
        "source_row": np.arange(len(catalog)),
        "key": list(catalog),
        modality: pa.array([fingerprint(of) for of in catalog.values()], schema.FINGERPRINT_TYPE),
    }
    ledger.add_catalog_rows(pa.table(rows), trusted=False)
    for file in files:
        ledger.add_stored_rows(table_of(store, file).select(["key", "fingerprint"]), file=file)
    ledger.settle()
    return ledger


def table_of(store: Store, file: StoredFile) -> pa.Table:
    with store.open(file.path) as opened:
        return pq.read_table(opened)


def bits(table: pa.Table) -> dict[Key, bytes]:
    """Key -> the embedding's bytes."""
    vectors = table[schema.EMBEDDING].combine_chunks().flatten().to_numpy()
    vectors = vectors.reshape(table.num_rows, -1)
    return {
        key: vector.tobytes()
        for key, vector in zip(table[schema.KEY].to_pylist(), vectors, strict=True)
    }


def copied(ledger: Ledger, *, store: Store, rows_per_file: int = 4096) -> list[StoredFile]:
    return list(copy_embeddings(ledger, rows_per_file=rows_per_file, plan_id="next", store=store))


# What a comparison of numbers would not tell apart.
ODD = np.array([-0.0, 0.0, 1e-45, -1e-45], dtype=np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_copies_are_the_same_bits_under_another_key(store: Store, dtype, modality):
    random = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    vectors = {"x": ODD, "y": random[0], "z": random[1]}
    old = embeddings_file(store, vectors, modality=modality, dtype=dtype)
    wanted = {"new-z": "z", "new-x": "x", "other": "elsewhere"}
    with ledger_of(wanted, [old], store=store, modality=modality) as ledger:
        (file,) = copied(ledger, store=store)
    before, after = table_of(store, old), table_of(store, file)
    assert (file.kind, file.modality, file.num_rows) == ("embeddings", modality, 2)
    assert file.path.startswith(f"embeddings/next/{modality}-")
    assert after.schema == before.schema
    assert bits(after) == {"new-x": bits(before)["x"], "new-z": bits(before)["z"]}
    others = ["modality", "fingerprint", "engine_id"]
    assert after.select(others).equals(before.take([0, 2]).select(others))


def test_integer_keys_stay_integers(store: Store):
    old = embeddings_file(store, {7: [1.0, 0.0], 8: [0.0, 1.0]})
    with ledger_of({2**63 - 1: "8", -5: "7"}, [old], store=store) as ledger:
        (file,) = copied(ledger, store=store)
    after = table_of(store, file)
    assert after.schema.field("key").type == pa.int64()
    before = bits(table_of(store, old))
    assert bits(after) == {2**63 - 1: before[8], -5: before[7]}


def test_files_are_of_bounded_size_whatever_they_are_copied_from(store: Store, monkeypatch):
    sources = [
        embeddings_file(store, {f"{part}{row}": [part, row] for row in range(3)})
        for part in range(4)
    ]
    # One content for ten keys, the others for one each.
    wanted = {f"n{number}": "20" for number in range(10)}
    wanted |= {f"m{part}{row}": f"{part}{row}" for part in range(4) for row in range(3)}
    read: list[str] = []
    opened = Store.open
    monkeypatch.setattr(Store, "open", lambda self, path: read.append(path) or opened(self, path))
    with ledger_of(wanted, sources, store=store) as ledger:
        read.clear()
        files = copied(ledger, store=store, rows_per_file=4)
    assert [file.num_rows for file in files] == [4, 4, 4, 4, 4, 2]
    # A source is read again only for another written file.
    assert len(read) <= len(sources) + len(files) - 1
    assert len(files) > COPY_THREADS
    expected = {key: np.array([int(of[0]), int(of[1])], np.float32) for key, of in wanted.items()}
    found = {key: of for file in files for key, of in bits(table_of(store, file)).items()}
    assert found == {key: vector.tobytes() for key, vector in expected.items()}


def test_nothing_to_copy_writes_nothing(store: Store):
    with ledger_of({"a": "a"}, [], store=store) as ledger:
        assert copied(ledger, store=store) == []
    assert store.list("embeddings", suffix="") == []


def test_a_source_that_is_damaged_is_named(store: Store, tmp_path: Path):
    old = embeddings_file(store, {"x": [1.0, 0.0]})
    with ledger_of({"new": "x"}, [old], store=store) as ledger:
        (tmp_path / old.path).write_bytes(b"PAR1 damaged PAR1")
        with pytest.raises(StoreError, match=f"{old.path} is damaged"):
            copied(ledger, store=store)
