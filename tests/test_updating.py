"""Tests of pipelines/indexes/updating.py and row_changes.py: nights against an exact search."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import RecallError
from pipelines.indexes import key_hashes
from pipelines.indexes.bitmaps import bitmap_of
from pipelines.indexes.manifest import IndexManifest
from pipelines.indexes.opening import OpenIndex, open_index
from pipelines.indexes.options import IndexOptions
from pipelines.indexing import check_recall, index_snapshot
from pipelines.snapshots import Snapshot, StoredFile, commit
from pipelines.store import Store
from tests.stored import embeddings_file, fingerprint, make_snapshot

DIM = 8
# Lists of vectors as they are: what a search of all of them finds is exact.
EXACT_LISTS = IndexOptions(factory="IVF4,Flat", min_recall=1.0)
Contents = Mapping[str, int]
"""Key -> what its vector is drawn from."""
KEYS: dict[str, list[str]] = {}
"""Path of a file -> its keys."""


def vector_of(content: int) -> np.ndarray:
    vector = np.random.default_rng(content).normal(size=DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def write_files(store: Store, contents: Contents, *, max_rows: int = 40) -> list[StoredFile]:
    keys = list(contents)
    files = []
    for first in range(0, len(keys), max_rows):
        part = keys[first : first + max_rows]
        vectors = {key: vector_of(contents[key]) for key in part}
        prints = [fingerprint(f"{contents[key]}") for key in part]
        files.append(embeddings_file(store, vectors, fingerprints=prints))
        KEYS[files[-1].path] = part
    return files


class Nights:
    """A store, night by night, and its index."""

    def __init__(self, store: Store, *, options: IndexOptions = EXACT_LISTS) -> None:
        self.store, self.options, self.number = store, options, 0
        self.snapshot: Snapshot | None = None

    def night(self, files: Sequence[StoredFile]) -> IndexManifest:
        self.number += 1
        snapshot = make_snapshot(files, number=self.number, embedding_dim=DIM)
        (manifest,) = index_snapshot(
            self.store, snapshot, options=self.options, promote=check_recall
        )
        commit(self.store, snapshot)
        self.snapshot = snapshot
        return manifest

    def index(self) -> OpenIndex:
        assert self.snapshot is not None
        return open_index(self.store, self.snapshot, modality="image")


def check_answers(index: OpenIndex, contents: Contents) -> None:
    """Every key is found by its own vector, and all answers are those of numpy."""
    keys = list(contents)
    assert index.rows.num_rows == len(keys)
    if not keys:
        return
    vectors = np.stack([vector_of(contents[key]) for key in keys])
    ids = index.rows.ids_of(pa.array(keys))
    assert len(set(ids.tolist())) == len(keys)
    queries = np.stack([vector_of(10**7 + number) for number in range(3)] + [vectors[0]])
    index.setting = 2**20
    num_hits = min(len(keys), 5)
    scores, found = index.search(queries, num_hits=num_hits)
    exact = np.sort(queries @ vectors.T, axis=1)[:, ::-1][:, :num_hits]
    assert np.allclose(scores, exact, atol=1e-5)
    places = {int(row_id): place for place, row_id in enumerate(ids)}
    of_found = np.array([[places[int(row_id)] for row_id in row] for row in found])
    assert np.allclose(np.take_along_axis(queries @ vectors.T, of_found, 1), exact, atol=1e-5)
    allowed = bitmap_of(ids[::3], num_ids=index.rows.num_ids)
    scores, found = index.search(queries, num_hits=num_hits, allowed=allowed)
    num_allowed = min(len(ids[::3]), num_hits)
    exact = np.sort(queries @ vectors[::3].T, axis=1)[:, ::-1][:, :num_allowed]
    assert np.allclose(scores[:, :num_allowed], exact, atol=1e-5)
    assert (found[:, num_allowed:] == -1).all()
    for key, row_id in list(zip(keys, ids.tolist(), strict=True))[:3]:
        assert np.allclose(index.vector_of(row_id), vector_of(contents[key]), atol=1e-5)


CHANGES = st.lists(
    st.dictionaries(
        st.integers(0, 60), st.one_of(st.none(), st.integers(0, 500)), min_size=1, max_size=12
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("num_hashes", [None, 3])
@settings(max_examples=12)
@given(changes=CHANGES, is_rewritten=st.booleans())
def test_nights_of_adding_changing_and_removing(
    tmp_path_factory, num_hashes, changes, is_rewritten
):
    """With hashes of three values, keys collide all the time."""
    store = Store(str(tmp_path_factory.mktemp("nights") / "store"))
    with pytest.MonkeyPatch.context() as patch:
        if num_hashes:
            hash_content = key_hashes.hash_content
            patch.setattr(
                key_hashes, "hash_content", lambda content: hash_content(content) % num_hashes
            )
        contents = {f"k{number}": number for number in range(50)}
        nights = Nights(store)
        files = write_files(store, contents)
        nights.night(files)
        ids: dict[str, int] = {}
        for change in changes:
            contents, files = changed(store, contents, files, change, is_rewritten=is_rewritten)
            manifest = nights.night(files)
            index = nights.index()
            assert manifest.num_rows == len(contents)
            check_answers(index, contents)
            now = dict(
                zip(
                    contents,
                    index.rows.ids_of(pa.array(list(contents), pa.string())).tolist(),
                    strict=True,
                )
            )
            assert all(now[key] == row_id for key, row_id in ids.items() if key in now)
            ids = now


def changed(
    store: Store,
    contents: Contents,
    files: list[StoredFile],
    change: Mapping[int, int | None],
    *,
    is_rewritten: bool,
) -> tuple[dict[str, int], list[StoredFile]]:
    """Contents and files of another night: files whose rows all stay are kept, or none is."""
    now = dict(contents)
    for number, content in change.items():
        if content is None:
            now.pop(f"k{number}", None)
        else:
            now[f"k{number}"] = content
    if is_rewritten:
        return now, write_files(store, now, max_rows=25)
    kept, left = [], dict(now)
    for file in files:
        keys = KEYS[file.path]
        if all(now.get(key) == contents[key] for key in keys):
            kept.append(file)
            for key in keys:
                left.pop(key)
    return now, [*kept, *write_files(store, left)]


def test_ids_stay_over_ten_nights_also_where_the_index_is_built_anew(tmp_path):
    store = Store(str(tmp_path / "store"))
    nights = Nights(store)
    rng = np.random.default_rng(0)
    contents = {f"k{number}": number for number in range(200)}
    first_ids: dict[str, int] = {}
    reasons = []
    for _ in range(10):
        manifest = nights.night(write_files(store, contents))
        reasons.append(manifest.reason)
        index = nights.index()
        check_answers(index, contents)
        keys = list(contents)
        for key, row_id in zip(keys, index.rows.ids_of(pa.array(keys)).tolist(), strict=True):
            assert first_ids.setdefault(key, row_id) == row_id
        for key in rng.choice(keys, 12, replace=False):
            del contents[str(key)]
            first_ids.pop(str(key))
        contents |= {f"n{number}": number for number in rng.integers(1000, 10**6, 12)}
    assert [reason for reason in reasons if reason.startswith("index of snapshot")]
    assert [reason for reason in reasons if "came, went or changed since" in reason]


def test_nights_of_a_store_that_is_not_on_a_disk_each_on_another_machine(tmp_path, monkeypatch):
    store = Store(f"memory://{tmp_path.name}")
    nights = Nights(store)
    contents = {f"k{number}": number for number in range(200)}
    files = write_files(store, contents)
    for number in range(3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{number}"))
        manifest = nights.night(files)
        assert manifest.reason.startswith("index of snapshot") == (number > 0)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"reader-{number}"))
        check_answers(nights.index(), contents)
        change = {number: None, number + 50: 1000 + number, 900 + number: 2000 + number}
        contents, files = changed(store, contents, files, change, is_rewritten=False)


def test_only_what_differs_is_read(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "store"))
    contents = {f"k{number}": number for number in range(200)}
    files = write_files(store, contents)
    nights = Nights(store)
    nights.night(files)
    (extra,) = write_files(store, {"new": 7000})
    read: list[str] = []
    opened = Store.open

    def noted(self: Store, relative: str):
        read.append(relative)
        return opened(self, relative)

    monkeypatch.setattr(Store, "open", noted)
    manifest = nights.night([*files[1:], extra])
    assert manifest.num_changed_rows == 41
    of_embeddings = {path for path in read if path.startswith("embeddings")}
    columns_of = min(file.path for file in [*files[1:], extra])  # of one file the schema is read
    assert of_embeddings == {files[0].path, extra.path, columns_of}
    del contents["k0"]
    for number in range(40):
        contents.pop(f"k{number}", None)
    check_answers(nights.index(), contents | {"new": 7000})


def test_an_update_that_finds_too_little_is_built_anew_and_says_so(tmp_path, monkeypatch):
    """Lists of 20 directions, into which come rows of others."""
    store = Store(str(tmp_path / "store"))
    contents = {f"k{number}": number for number in range(300)}
    files = write_files(store, contents)
    nights = Nights(store)
    nights.night(files)
    search = OpenIndex.search

    def worse(self: OpenIndex, vectors: np.ndarray, **words):
        scores, ids = search(self, vectors, **words)
        return (scores, ids * 0) if "index of snapshot" in self.manifest.reason else (scores, ids)

    monkeypatch.setattr(OpenIndex, "search", worse)
    (extra,) = write_files(store, {"new": 7000})
    manifest = nights.night([*files, extra])
    assert manifest.reason.endswith("built anew: updated, it found less than 1")
    assert manifest.num_changed_rows == 0


def test_an_index_that_finds_too_little_is_not_promoted(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "store"))
    nights = Nights(store, options=dataclasses.replace(EXACT_LISTS, min_recall=0.9))
    search = OpenIndex.search
    monkeypatch.setattr(
        OpenIndex,
        "search",
        lambda self, vectors, **words: (
            search(self, vectors, **words)[0],
            np.full((len(vectors), words["num_hits"]), -1),
        ),
    )
    with pytest.raises(RecallError, match=r"recall@10 is 0\.000 of image queries, 0\.9 was asked"):
        nights.night(write_files(store, {f"k{number}": number for number in range(100)}))
    assert not list((tmp_path / "store").rglob("manifest.json"))


@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "HNSW8,SQ8",
        "IVF8,SQ8",
        "IVF8,SQfp16",
        "IVF8_HNSW4,SQ8",
        "IVF8,RaBitQ,Refine(SQfp16)",
        "IVF8,RaBitQ4,Refine(SQfp16)",
        "IVF8,PQ4,Refine(SQfp16)",
    ],
)
def test_every_type_is_built_changed_filtered_and_opened(tmp_path, factory):
    store = Store(str(tmp_path / "store"))
    contents = {f"k{number}": number for number in range(400)}
    files = write_files(store, contents)
    nights = Nights(store, options=IndexOptions(factory=factory, min_recall=0.5))
    nights.night(files)
    del contents["k3"]
    contents["k399"] = 5000
    manifest = nights.night(
        [
            *files[1:-1],
            *write_files(
                store,
                {
                    key: contents[key]
                    for key in [
                        *(f"k{n}" for n in range(40) if n != 3),
                        *(f"k{n}" for n in range(360, 400)),
                    ]
                },
            ),
        ]
    )
    assert manifest.factory == factory
    assert manifest.reason.startswith("index of snapshot 1 with 1 rows") == (manifest.kind == "ivf")
    index = nights.index()
    assert index.rows.id_of("k3") is None
    index.setting = 400
    ids = index.rows.ids_of(pa.array(list(contents)))
    vectors = np.stack([vector_of(content) for content in contents.values()])
    scores, found = index.search(vectors, num_hits=1)
    assert (found[:, 0] == ids).mean() > 0.85
    assert np.abs(scores[:, 0] - 1).max() < 0.3
    allowed = bitmap_of(ids[:7], num_ids=index.rows.num_ids)
    _, found = index.search(vectors[:2], num_hits=10, allowed=allowed)
    assert [set(row.tolist()) for row in found] == [{-1, *ids[:7].tolist()}] * 2
    _, found = index.search(vectors[:2], num_hits=399)
    assert [set(row.tolist()) for row in found] == [set(ids.tolist())] * 2
    assert index.vector_of(int(ids[5])) @ vectors[5] > 0.9
