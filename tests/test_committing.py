"""What is committed of what a run wrote, and what is not: another state, whole, and approved."""

import dataclasses
from pathlib import Path

import pytest

from pipelines import committing
from pipelines.committing import Approve, commit_candidate
from pipelines.counts import Counts
from pipelines.errors import CommitConflictError, GuardError, IncompleteRunError
from pipelines.guarding.candidate import Candidate
from pipelines.snapshots import Snapshot, StoredFile, commit, current_snapshot
from pipelines.store import Store
from tests.stored import commit_vectors, embeddings_file, make_snapshot

COUNTS = Counts(num_rows=1, num_keys=1, num_due_rows=1, keys={})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def written(store: Store, key: str) -> StoredFile:
    return embeddings_file(store, {key: [1.0, 0.0]})


def committed(
    store: Store,
    *files: StoredFile,
    parent: Snapshot | None = None,
    approve: Approve | None = None,
) -> Snapshot:
    """Commit these files beside those of the parent."""
    before = () if parent is None else parent.files
    number = 1 if parent is None else parent.number + 1
    snapshot = make_snapshot([*before, *files], number=number, embedding_dim=2)
    candidate = Candidate(
        snapshot=snapshot, parent=parent, encoded=files, counts=COUNTS, num_rejected=0
    )
    return commit_candidate(candidate, before=before, store=store, approve=approve)


def approved(candidate: Candidate) -> Snapshot:
    return dataclasses.replace(candidate.snapshot, run_id="looked-at")


def refused(candidate: Candidate) -> Snapshot:
    raise GuardError("refused")


def test_what_was_approved_is_the_current_snapshot(store: Store):
    first = committed(store, written(store, "a"))
    assert current_snapshot(store) == first
    second = committed(store, written(store, "b"), parent=first, approve=approved)
    assert second.run_id == "looked-at"
    assert current_snapshot(store) == second


def test_what_is_refused_is_not_committed(store: Store):
    first = commit_vectors(store, image=[{"a": [1.0, 0.0]}])
    with pytest.raises(GuardError, match="refused"):
        committed(store, written(store, "b"), parent=first, approve=refused)
    assert current_snapshot(store) == first


def test_the_same_state_is_not_committed_again_and_nobody_is_asked(store: Store):
    first = commit_vectors(store, image=[{"a": [1.0, 0.0]}])
    assert committed(store, parent=first, approve=refused) == first
    assert current_snapshot(store) == first


def test_of_two_runs_one_commits(store: Store):
    first = commit_vectors(store, image=[{"a": [1.0, 0.0]}])
    second = committed(store, written(store, "b"), parent=first)
    with pytest.raises(CommitConflictError):
        committed(store, written(store, "c"), parent=first)
    assert current_snapshot(store) == second


@pytest.mark.parametrize("moment", ["before", "looked at", "committed"])
def test_what_is_vacuumed_meanwhile_is_not_committed(
    store: Store, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """Also if that is seen only afterwards: then it is taken back."""
    first = commit_vectors(store, image=[{"a": [1.0, 0.0]}])
    files = [written(store, "b"), written(store, "c")]
    looked_at = []

    def vacuumed_at(now: str) -> None:
        if now == moment:
            store.remove(files[1].path)

    def approve(candidate: Candidate) -> Snapshot:
        looked_at.append(candidate)
        vacuumed_at("looked at")
        return candidate.snapshot

    def commit_late(store: Store, snapshot: Snapshot) -> None:
        vacuumed_at("committed")
        commit(store, snapshot)

    monkeypatch.setattr(committing, "commit", commit_late)
    vacuumed_at("before")
    with pytest.raises(IncompleteRunError) as caught:
        committed(store, *files, parent=first, approve=approve)
    assert str(caught.value) == (
        f"1 files of this run or an unfinished one are gone, {files[1].path} is one: the store was "
        "vacuumed meanwhile. Nothing was committed; run the same command again"
    )
    assert bool(looked_at) == (moment != "before")
    assert current_snapshot(store) == first


def test_files_that_were_there_before_are_not_looked_for(store: Store):
    """A store of years has many, and a vacuum leaves them alone."""
    first = commit_vectors(store, image=[{"a": [1.0, 0.0]}])
    store.remove(first.files[0].path)
    assert committed(store, written(store, "b"), parent=first).number == 2
