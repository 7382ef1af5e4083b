"""Nights and their indexes: there before the commit, with the recall asked for, or no commit."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CommitConflictError
from pipelines.indexes.manifest import find_index
from pipelines.indexes.opening import OpenIndex
from pipelines.store import Store
from tests.catalogs import stored_snapshot, write_rows
from tests.night import Night, current, text_rows


def test_what_cannot_be_indexed_is_refused_before_it_is_embedded(night: Night):
    """Unless all could still be rejects; rows of the store count as well as new ones."""
    write_rows(night.catalog_dir, text_rows(90))
    before = night.files()
    dim = stored_snapshot(night.store_dir).embedding_dim
    # Of 90 keys, 19 rejects would trip no guard.
    # A bit for each value, two factors and an id, and 32 centroids.
    needed = 71 * (dim // 8 + 8 + 8) + 4 * 32 * dim
    done = night.run("--max-memory-bytes", needed - 1)
    assert done.code == 1
    assert f"an index of 71 x {dim} wants {needed} at least" in done.err
    # Nothing but the record of a run that failed.
    after = night.files()
    (record,) = after.keys() - before.keys()
    assert record.startswith("runs/")
    assert {path: after[path] for path in before} == before
    done = night.run("--max-memory-bytes", needed)
    assert f"an index of 90 x {dim} wants" in done.err
    assert night.done("--dry-run")["plan"]["text"]["num_staged"] == 30
    # With an index that is there, what memory there is does not matter.
    assert night.done()["snapshot"] == 2
    assert night.done("--max-memory-bytes", 1)["outcome"] == "unchanged"


def test_an_index_that_is_missing_is_built(night: Night):
    answers = night.answers()
    shutil.rmtree(night.store_dir / "indexes")
    was = current(night)
    done = night.run()
    assert (done.code, current(night)) == (0, was)
    assert "indexes: 1 built, 1 there" in done.out
    assert night.answers() == answers


def test_the_index_is_there_before_the_commit(night: Night, monkeypatch: pytest.MonkeyPatch):
    write_rows(night.catalog_dir, text_rows(61))
    seen = []

    def noted(store: Store, snapshot) -> None:
        seen.append(find_index(store, snapshot, modality="text"))
        raise CommitConflictError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.committing.commit", noted)
        assert night.run().code == 1
    assert seen[0] is not None
    report = night.done()
    assert (report["num_indexes_built"], report["run"]["num_embedded"]) == (0, {"text": 0})


def finds_nothing(
    _: OpenIndex, vectors: np.ndarray, *, num_hits: int, **__: Any
) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(vectors), num_hits)
    return np.full(shape, -np.inf), np.full(shape, -1)


def promoted(night: Night) -> list[Path]:
    return sorted((night.store_dir / "indexes").glob("*/manifest.json"))


def test_an_index_with_faults_is_not_promoted(night: Night, monkeypatch: pytest.MonkeyPatch):
    write_rows(night.catalog_dir, text_rows(61))
    was, served = current(night), promoted(night)
    with monkeypatch.context() as patch:
        patch.setattr(OpenIndex, "search", finds_nothing)
        for _ in range(2):
            done = night.run()
            assert (done.code, current(night)) == (1, was)
            assert "recall of text: 0.0000, at least 0.95 is allowed" in done.err
            assert promoted(night) == served
    assert night.done()["snapshot"] == 2
    assert len(promoted(night)) == 2


def test_an_index_with_faults_that_is_accepted_is_promoted(
    night: Night, monkeypatch: pytest.MonkeyPatch
):
    write_rows(night.catalog_dir, text_rows(61))
    with monkeypatch.context() as patch:
        patch.setattr(OpenIndex, "search", finds_nothing)
        report = night.done("--accept", "recall")
    assert report["lineage"]["accepted"] == ["recall"]
    assert len(promoted(night)) == 2


def test_an_index_with_faults_is_not_put_in_the_place_of_a_missing_one(
    night: Night, monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(night.store_dir / "indexes")
    with monkeypatch.context() as patch:
        patch.setattr(OpenIndex, "search", finds_nothing)
        done = night.run()
        assert done.code == 1
        assert "Snapshot 1 is current, and stays without this index" in done.err
    assert promoted(night) == []
    assert "indexes: 1 built, 1 there" in night.run().out
