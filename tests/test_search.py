"""Answers of a real store: by text, image and vector, and what cannot be asked."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import IndexMissingError, StoreError
from pipelines.indexing import IndexConfig, build_index
from pipelines.search import Searcher
from pipelines.snapshots import commit, rollback
from pipelines.store import Store
from tests.catalogs import scene_rows, stored_embeddings, stored_snapshot
from tests.stored import embeddings_file


@pytest.fixture(scope="module")
def searcher(scene_store: Path, engines_dir: Path) -> Searcher:
    return Searcher(str(scene_store), engines_uri=str(engines_dir), modality=None)


def test_an_image_finds_itself_first(searcher: Searcher):
    rows = scene_rows(60)[::6]
    answers = searcher.by_image([row["image"] for row in rows], num_hits=3)
    assert [hits[0].key for hits in answers] == [row["key"] for row in rows]
    assert all(hits[0].score == pytest.approx(1, abs=1e-4) for hits in answers)
    assert all(hits[0].score >= hits[1].score >= hits[2].score for hits in answers)


def test_captions_find_their_pictures(searcher: Searcher):
    rows = scene_rows(60)
    answers = searcher.by_text([row["text"] for row in rows], num_hits=5)
    found = [
        row["key"] in [hit.key for hit in hits] for row, hits in zip(rows, answers, strict=True)
    ]
    assert np.mean(found) >= 0.9


def test_vectors_are_ranked_by_cosine(searcher: Searcher, scene_store: Path):
    vectors = stored_embeddings(scene_store, modality="image")
    query = vectors["k0007"]
    expected = sorted(vectors, key=lambda key: -float(vectors[key] @ query))[:10]
    hits = searcher.by_vector(query[None], num_hits=10)[0]
    assert [hit.key for hit in hits] == expected
    assert hits[1].score == pytest.approx(float(vectors[expected[1]] @ query), abs=1e-5)


def test_texts_can_be_searched_too(scene_store: Path, engines_dir: Path):
    among_texts = Searcher(str(scene_store), engines_uri=str(engines_dir), modality="text")
    row = scene_rows(60)[9]
    assert among_texts.by_text([row["text"]], num_hits=1)[0][0].key == row["key"]


def test_no_more_hits_than_rows(searcher: Searcher):
    assert len(searcher.by_text(["a ring"], num_hits=1_000)[0]) == 60


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda found: found.by_text(["  "], num_hits=1), "query text is empty"),
        (lambda found: found.by_text(["a ring"], num_hits=0), "num_hits=0: expected at least 1"),
        (lambda found: found.by_image([b"no picture"], num_hits=1), "not_an_image"),
        (
            lambda found: found.by_vector(np.ones((1, 7), np.float32), num_hits=1),
            r"vectors are \[1, 7\], expected",
        ),
    ],
)
def test_what_cannot_be_asked_is_a_value_error(searcher: Searcher, ask, message: str):
    with pytest.raises(ValueError, match=message):
        ask(searcher)


def test_a_store_without_snapshot_index_or_modality_says_so(
    scene_store: Path, engines_dir: Path, tmp_path: Path
):
    with pytest.raises(StoreError, match="no snapshot; run `clipmill embed` first"):
        Searcher(str(tmp_path / "empty"), engines_uri=str(engines_dir), modality=None)
    bare = tmp_path / "bare"
    shutil.copytree(scene_store, bare)
    shutil.rmtree(bare / "indexes")
    with pytest.raises(IndexMissingError, match="run `clipmill index"):
        Searcher(str(bare), engines_uri=str(engines_dir), modality="image")


def test_the_engine_answers_when_its_checkpoint_is_gone(
    scene_store: Path, engines_dir: Path, tmp_path: Path
):
    moved = tmp_path / "store"
    shutil.copytree(scene_store, moved)
    manifest = next((moved / "snapshots").iterdir())
    record = manifest.read_text()
    start = record.index('"checkpoint": "') + len('"checkpoint": "')
    gone = record[:start] + str(tmp_path / "gone") + record[record.index('"', start) :]
    manifest.write_text(gone)
    found = Searcher(str(moved), engines_uri=str(engines_dir), modality="image")
    assert found.by_text(["a ring"], num_hits=1)[0]


def test_after_a_rollback_answers_are_those_of_before(
    scene_store: Path, engines_dir: Path, tmp_path: Path
):
    copy = tmp_path / "store"
    shutil.copytree(scene_store, copy)
    store, first = Store(str(copy)), stored_snapshot(copy)
    texts = [row["text"] for row in scene_rows(60)[::7]]

    def answers() -> list:
        searcher = Searcher(store.uri, engines_uri=str(engines_dir), modality="image")
        return searcher.by_text(texts, num_hits=10)

    before = answers()
    vectors = stored_embeddings(copy, modality="image")
    fewer = embeddings_file(store, {key: vectors[key] for key in sorted(vectors)[:20]})
    texts_stay = first.files_of("embeddings", modality="text")
    commit(store, dataclasses.replace(first, number=2, parent=1, files=(fewer, *texts_stay)))
    with pytest.raises(IndexMissingError, match="snapshot 2; run `clipmill index"):
        answers()
    build_index(IndexConfig(store_uri=store.uri))
    assert answers() != before
    rollback(store, 1)
    assert answers() == before
