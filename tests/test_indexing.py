"""Tests of pipelines/indexing.py and indexes/manifest.py: a real FAISS, and answers from numpy."""

import dataclasses
import errno
import json
import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import index, snapshots
from pipelines.errors import IndexMissingError, PipelineError, StoreError
from pipelines.indexes import options as options_module
from pipelines.indexes.manifest import (
    FORMAT_VERSION,
    find_index,
    index_dir,
    missing_indexes,
)
from pipelines.indexes.opening import OpenIndex, open_index
from pipelines.indexes.options import IndexOptions
from pipelines.indexing import (
    IndexConfig,
    build_index,
)
from pipelines.snapshots import (
    Snapshot,
    commit,
    current_snapshot,
    rollback,
    snapshot_numbers,
)
from pipelines.store import Store
from tests.commands import command
from tests.stored import (
    ENGINE_ID,
    commit_vectors,
    embeddings_file,
    indexed,
    make_snapshot,
)

DIM = 16


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def unit_vectors(num_rows: int, *, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def folder_of(snapshot: Snapshot) -> str:
    return index_dir(snapshot, modality="image")


def keyed(vectors: np.ndarray, *, first: int = 0) -> dict[str, np.ndarray]:
    return {f"k{first + row}": vector for row, vector in enumerate(vectors)}


def build_of(store: Store, snapshot: Snapshot) -> str:
    """The folder with the files of an index."""
    manifest = find_index(store, snapshot, modality="image")
    assert manifest is not None
    return manifest.folder


def keys_of(index: OpenIndex, ids: np.ndarray) -> list:
    return [index.rows.keys_of(row).to_pylist() for row in ids]


def small_index(store: Store) -> Snapshot:
    """Three vectors, indexed."""
    snapshot = commit_vectors(store, image=[keyed(unit_vectors(3))])
    build_index(IndexConfig(store_uri=store.uri))
    return snapshot


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_finds_what_an_exact_search_in_numpy_finds(store, dtype):
    vectors = unit_vectors(300)
    parts = [keyed(vectors[first : first + 100], first=first) for first in (0, 100, 200)]
    snapshot = commit_vectors(store, image=parts, dtype=dtype)
    (manifest,) = build_index(IndexConfig(store_uri=store.uri))
    assert (manifest.num_rows, manifest.embedding_dim, manifest.modality) == (300, DIM, "image")
    assert (manifest.engine_id, manifest.factory) == (ENGINE_ID, "Flat")
    assert f"indexes/{manifest.index_id}" == folder_of(snapshot)

    index = open_index(store, snapshot, modality="image")
    queries = unit_vectors(20, seed=1)
    scores, ids = index.search(queries, num_hits=10)
    stored = vectors.astype(dtype).astype(np.float32)
    exact = np.argsort(-queries @ stored.T, axis=1)[:, :10]
    assert keys_of(index, ids) == [[f"k{row}" for row in rows] for rows in exact]
    assert np.allclose(scores, np.take_along_axis(queries @ stored.T, exact, 1), atol=1e-6)


def test_each_modality_has_an_index_of_its_own_and_keys_keep_their_type(store):
    images, texts = unit_vectors(2), unit_vectors(3, seed=1)
    snapshot = commit_vectors(
        store,
        image=[dict(zip([7, -1], images, strict=True))],
        text=[dict(zip([-1, 7, 2**62], texts, strict=True))],
    )
    manifests = build_index(IndexConfig(store_uri=store.uri))
    assert [(manifest.modality, manifest.num_rows) for manifest in manifests] == [
        ("image", 2),
        ("text", 3),
    ]
    index = open_index(store, snapshot, modality="text")
    assert index.rows.key_type == pa.int64()
    assert index.rows.keys_of(np.arange(3)).to_pylist() == [-1, 7, 2**62]
    assert index.search(texts[2:], num_hits=1)[1].tolist() == [[2]]


def test_a_modality_of_which_all_rows_were_rejected_has_an_empty_index(store):
    commit(store, make_snapshot([], embedding_dim=DIM))
    (manifest,) = build_index(IndexConfig(store_uri=store.uri))
    assert manifest.num_rows == 0
    snapshot = current_snapshot(store)
    assert snapshot is not None
    index = open_index(store, snapshot, modality="image")
    scores, ids = index.search(unit_vectors(1), num_hits=2)
    assert (index.rows.num_rows, ids.tolist(), scores.tolist()) == (0, [[-1, -1]], [[-np.inf] * 2])


def test_another_type_than_that_which_is_there_is_refused(store):
    snapshot = commit_vectors(store, image=[keyed(unit_vectors(300))])
    (exact,) = build_index(IndexConfig(store_uri=store.uri))
    named = IndexConfig(store_uri=store.uri, options=IndexOptions(factory="HNSW32,Flat"))
    with pytest.raises(PipelineError, match=r"snapshot 1 has an index .* Flat, .* remove .*/index"):
        build_index(named)
    same = IndexConfig(store_uri=store.uri, options=IndexOptions(factory="Flat"))
    assert build_index(same) == [exact]
    store.remove(folder_of(snapshot))
    (graph,) = build_index(named)
    assert (graph.factory, graph.index_id) == ("HNSW32,Flat", exact.index_id)


def test_an_index_that_is_there_is_kept(store, tmp_path):
    snapshot = small_index(store)
    path = tmp_path / "store" / build_of(store, snapshot) / "index.faiss"
    before = path.stat().st_ino
    assert build_index(IndexConfig(store_uri=store.uri))[0].num_rows == 3
    assert path.stat().st_ino == before

    (tmp_path / "store" / folder_of(snapshot) / "manifest.json").unlink()
    store.remove(build_of_only(store, snapshot))
    assert not path.exists()
    build_index(IndexConfig(store_uri=store.uri))
    assert path.exists()


def build_of_only(store: Store, snapshot: Snapshot) -> str:
    (name,) = store.names(folder_of(snapshot))
    return f"{folder_of(snapshot)}/{name}"


def test_a_new_snapshot_has_a_new_index_and_the_old_one_stays(store):
    first = small_index(store)
    second = commit_vectors(store, number=2, image=[keyed(unit_vectors(5))])
    with pytest.raises(IndexMissingError, match=f"clipmill index --store {store.uri}"):
        open_index(store, second, modality="image")
    build_index(IndexConfig(store_uri=store.uri))
    assert open_index(store, second, modality="image").manifest.num_rows == 5
    assert open_index(store, first, modality="image").manifest.num_rows == 3


def test_snapshots_of_the_same_embeddings_share_an_index(store, tmp_path):
    first = commit_vectors(store, image=[keyed(unit_vectors(3)), keyed(unit_vectors(2), first=3)])
    (manifest,) = indexed(store, first)
    rejects = dataclasses.replace(first.files[0], path="rejects/p/1.parquet", kind="rejects")
    again = dataclasses.replace(first, number=7, files=(*reversed(first.files), rejects))
    path = tmp_path / "store" / build_of(store, first) / "index.faiss"
    before = path.stat().st_ino
    assert indexed(store, again) == [manifest]
    assert path.stat().st_ino == before


def test_a_rollback_moves_the_index_with_it(store):
    first = small_index(store)
    queries = unit_vectors(5, seed=9)

    def answers(snapshot: Snapshot) -> tuple:
        index = open_index(store, snapshot, modality="image")
        scores, ids = index.search(queries, num_hits=3)
        return scores.tolist(), keys_of(index, ids)

    before = answers(first)
    second = commit_vectors(store, number=2, image=[keyed(unit_vectors(50, seed=1))])
    indexed(store, second)
    assert answers(second) != before
    assert answers(rollback(store, 1)) == before
    assert answers(rollback(store, 2)) == answers(second)


def test_what_is_not_the_same_has_an_index_of_its_own(store):
    snapshot = commit_vectors(store, image=[keyed(unit_vectors(3)), keyed(unit_vectors(2))])
    image, text = (
        [dataclasses.replace(file, modality=modality) for file in snapshot.files]
        for modality in ("image", "text")
    )
    engine = dataclasses.replace(snapshot.engine, engine_id="another")
    others = [
        snapshot,
        dataclasses.replace(snapshot, files=(*image, *text)),  # of images the same
        dataclasses.replace(snapshot, files=tuple(image[:1])),
        dataclasses.replace(snapshot, engine=engine),
    ]
    same, same_images, *different = map(folder_of, others)
    assert same_images == same
    assert len({same, *different}) == 3
    assert index_dir(others[1], modality="text") != same


def test_a_snapshot_is_indexed_before_it_is_committed(store):
    commit_vectors(store, image=[keyed(unit_vectors(3))])
    files = [embeddings_file(store, keyed(unit_vectors(5, seed=1)))]
    following = make_snapshot(files, number=2, embedding_dim=DIM)
    assert [manifest.num_rows for manifest in indexed(store, following)] == [5]
    commit(store, following)
    assert open_index(store, following, modality="image").manifest.num_rows == 5


def test_whoever_builds_an_index_writes_the_same_bytes(store):
    snapshot = commit_vectors(store, image=[keyed(unit_vectors(3)), keyed(unit_vectors(2))])
    contents = []
    for files in (snapshot.files, snapshot.files[::-1]):
        indexed(store, dataclasses.replace(snapshot, files=files))
        names = store.list(build_of(store, snapshot), suffix="")
        contents.append({name: store.read(name) for name in names})
        store.remove(folder_of(snapshot))
    assert len(contents[0]) == 4
    assert contents[0] == contents[1]


def test_an_index_of_format_1_is_built_anew(store):
    snapshot = commit_vectors(store, image=[keyed(unit_vectors(3))])
    record = {"format_version": 1, "index_id": "x", "modality": "image", "num_rows": 3}
    store.publish(f"{folder_of(snapshot)}/manifest.json", json.dumps(record).encode())
    assert find_index(store, snapshot, modality="image") is None
    build_index(IndexConfig(store_uri=store.uri))
    assert open_index(store, snapshot, modality="image").manifest.num_rows == 3


FILES = ("index.faiss", "rows.arrow", "hashes.npy", "queries.npz")


@pytest.mark.parametrize("full_at", [*FILES, "manifest.json"])
def test_a_half_written_index_is_not_found_and_is_built_again(store, monkeypatch, full_at):
    snapshot = commit_vectors(store, image=[keyed(unit_vectors(3))])
    replace = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if str(target).endswith(full_at):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError, match=r"(?i)no space left"):
            build_index(IndexConfig(store_uri=store.uri))
    assert find_index(store, snapshot, modality="image") is None
    assert build_index(IndexConfig(store_uri=store.uri))[0].num_rows == 3
    assert open_index(store, snapshot, modality="image").manifest.num_rows == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_an_error_with_the_way_out(store, tmp_path, name, share):
    snapshot = small_index(store)
    path: Path = tmp_path / "store" / build_of(store, snapshot) / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content.rstrip()))])
    with pytest.raises(StoreError, match=r"(?s)is damaged.*remove the folder.*`clipmill index`"):
        open_index(store, snapshot, modality="image")


@pytest.mark.parametrize("is_there", [True, False])
def test_an_index_that_lacks_bytes_is_built_again(store, tmp_path, caplog, is_there):
    snapshot = small_index(store)
    path: Path = tmp_path / "store" / build_of(store, snapshot) / "index.faiss"
    content = path.read_bytes()
    if is_there:
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    caplog.set_level(logging.WARNING)  # Ray may have left its handler with another
    assert build_index(IndexConfig(store_uri=store.uri))[0].num_rows == 3
    assert "(index.faiss is not what was written), and built again" in caplog.text
    assert path.read_bytes() == content
    assert open_index(store, snapshot, modality="image").manifest.num_rows == 3


def test_an_index_is_built_though_the_one_before_is_damaged(store, tmp_path):
    path: Path = tmp_path / "store" / build_of(store, small_index(store)) / "index.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    second = commit_vectors(store, number=2, image=[keyed(unit_vectors(5))])
    build_index(IndexConfig(store_uri=store.uri))
    assert open_index(store, second, modality="image").manifest.num_rows == 5
    assert path.exists()  # whoever serves it from a copy goes on


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_manifest_is_an_error_with_the_way_out(store, share):
    snapshot = small_index(store)
    path = f"{folder_of(snapshot)}/manifest.json"
    content = store.read(path).rstrip()
    store.publish(path, content[: int(share * len(content))])
    with pytest.raises(StoreError, match=r"(?s)is damaged.*remove the folder.*`clipmill index`"):
        open_index(store, snapshot, modality="image")


def test_a_file_that_is_missing_is_an_error(store, tmp_path):
    snapshot = small_index(store)
    (tmp_path / "store" / build_of(store, snapshot) / "rows.arrow").unlink()
    with pytest.raises(StoreError, match=r"(?s)damaged.*rows\.arrow.*`clipmill index` again"):
        open_index(store, snapshot, modality="image")


def test_an_index_of_a_newer_format_is_refused(store):
    snapshot = small_index(store)
    record = json.loads(store.read(f"{folder_of(snapshot)}/manifest.json"))
    record |= {"format_version": FORMAT_VERSION + 1, "unknown": "field"}
    store.publish(f"{folder_of(snapshot)}/manifest.json", json.dumps(record).encode())
    with pytest.raises(StoreError, match="is of format 3, this Clipmill reads 2; upgrade"):
        find_index(store, snapshot, modality="image")


def test_a_field_of_a_newer_clipmill_is_no_damage(store):
    snapshot = small_index(store)
    record = json.loads(store.read(f"{folder_of(snapshot)}/manifest.json"))
    store.publish(f"{folder_of(snapshot)}/manifest.json", json.dumps({**record, "hue": 1}).encode())
    with pytest.raises(StoreError, match="newer Clipmill, this one does not know its field 'hue'"):
        find_index(store, snapshot, modality="image")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_a_flipped_bit_is_seen(store, name, share):
    """FAISS loads the vectors that it gives, and Arrow keys."""
    snapshot = commit_vectors(store, image=[keyed(unit_vectors(300))])
    build_index(IndexConfig(store_uri=store.uri))
    path = f"{build_of(store, snapshot)}/{name}"
    content = bytearray(store.read(path))
    content[int(share * len(content))] ^= 1
    store.publish(path, bytes(content))
    with pytest.raises(StoreError, match=rf"is damaged \({name} is not what was written\)"):
        open_index(store, snapshot, modality="image")


def test_a_snapshot_is_indexed_by_its_number(store):
    first = commit_vectors(store, image=[keyed(unit_vectors(3))])
    second = commit_vectors(store, image=[keyed(unit_vectors(4))], number=2)
    done = command(index.main, ["--store", store.uri, "--snapshot", "1"])
    assert done.code == 0
    assert done.out.startswith("image: 3 x 16")
    assert missing_indexes(store, first) == []
    assert missing_indexes(store, second) == ["image"]
    done = command(index.main, ["--store", store.uri, "--snapshot", "7"])
    assert (done.code, "has no snapshot 7, but 1 to 2" in done.err) == (1, True)


def test_readers_that_can_query_are_not_rolled_back_to_where_they_cannot(store):
    commit_vectors(store, image=[keyed(unit_vectors(3))])
    commit_vectors(store, image=[keyed(unit_vectors(4))], number=2)
    build_index(IndexConfig(store_uri=store.uri))
    words = ["rollback", "1", "--store", store.uri]
    done = command(snapshots.main, words)
    assert done.code == 1
    assert "snapshot 1 has no index of image embeddings, the current one has; run" in done.err
    assert f"`clipmill index --store {store.uri} --snapshot 1` first" in done.err
    assert snapshot_numbers(store) == [1, 2]
    assert command(index.main, ["--store", store.uri, "--snapshot", "1"]).code == 0
    assert command(snapshots.main, words).code == 0
    current = current_snapshot(store)
    assert current is not None
    assert open_index(store, current, modality="image").manifest.num_rows == 3


def test_a_store_without_indexes_is_rolled_back_without_them(store):
    commit_vectors(store, image=[keyed(unit_vectors(3))])
    commit_vectors(store, image=[keyed(unit_vectors(4))], number=2)
    assert command(snapshots.main, ["rollback", "1", "--store", store.uri]).code == 0


# Of 100 rows the least that any index wants: a bit a value, two factors, an id; 32 centroids.
LEAST_BYTES = 100 * (2 + 8 + 8) + 4 * 32 * DIM


def test_half_of_what_a_container_may_use_is_the_bound(store, monkeypatch):
    """Of the container, not of the machine."""
    commit_vectors(store, image=[keyed(unit_vectors(100))])
    monkeypatch.setattr(options_module, "get_system_memory", lambda: 2 * LEAST_BYTES - 1)
    with pytest.raises(PipelineError, match=f"max_memory_bytes={LEAST_BYTES - 1}: .* wants"):
        build_index(IndexConfig(store_uri=store.uri))
    monkeypatch.setattr(options_module, "get_system_memory", lambda: 2 * 4 * 100 * DIM)
    assert build_index(IndexConfig(store_uri=store.uri))[0].factory == "Flat"


def test_vectors_that_do_not_fit_are_refused_before_they_are_read(store):
    snapshot = commit_vectors(store, image=[keyed(unit_vectors(100))])
    config = IndexConfig(
        store_uri=store.uri, options=IndexOptions(max_memory_bytes=LEAST_BYTES - 1)
    )
    with pytest.raises(PipelineError, match=f"wants {LEAST_BYTES} at least"):
        build_index(config)
    assert store.names("indexes") == []
    assert find_index(store, snapshot, modality="image") is None


def test_a_store_without_a_snapshot_is_refused(store):
    with pytest.raises(StoreError, match="run `clipmill embed` first"):
        build_index(IndexConfig(store_uri=store.uri))


def test_a_damaged_file_of_embeddings_is_named(store, tmp_path):
    snapshot = commit_vectors(store, image=[keyed(unit_vectors(3))])
    (file,) = snapshot.files
    (tmp_path / "store" / file.path).write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(StoreError, match=f"{file.path} is damaged"):
        build_index(IndexConfig(store_uri=store.uri))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory_bytes": 0}, "max_memory_bytes=0: expected at least 1"),
        ({"min_recall": 1.5}, "min_recall=1.5: expected 0 to 1"),
        ({"factory": "IVF"}, "factory='IVF': expected one of Flat; "),
    ],
)
def test_options_out_of_bounds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IndexOptions(**options)
