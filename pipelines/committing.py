"""Commits what a run wrote as the next snapshot, if it is another state and may be one.

Knows nothing of how the rows came about, or of what is fit to be committed.
"""

from collections.abc import Callable, Collection

from pipelines.errors import IncompleteRunError
from pipelines.guarding.candidate import Candidate
from pipelines.parent import same_state
from pipelines.snapshots import Snapshot, StoredFile, commit, missing_files
from pipelines.store import Store

# Looks at what a run would commit. Gives the snapshot back, with what it has to say in the lineage,
# or raises: then nothing is committed, and what was embedded stays staged.
Approve = Callable[[Candidate], Snapshot]


def commit_candidate(
    candidate: Candidate, *, before: Collection[StoredFile], store: Store, approve: Approve | None
) -> Snapshot:
    """The current snapshot: the candidate's, or its parent if that is of the same state.

    Args:
        candidate: What would be committed.
        before: Files of it that are in the store for long.
        store: Where it is committed.
        approve: Called before that; what it raises is raised.

    Raises:
        IncompleteRunError: Files are gone; nothing was committed.
        CommitConflictError: Another run committed first.
    """
    snapshot, parent = candidate.snapshot, candidate.parent
    new = set(snapshot.files).difference(before)
    _check_there(store, new)
    if parent is not None and same_state(snapshot, parent):
        return parent
    if approve is not None:
        snapshot = approve(candidate)
        _check_there(store, new)  # again: looking at it may have taken long
    commit(store, snapshot)
    try:
        _check_there(store, new)
    except IncompleteRunError:
        # A vacuum may have removed them before it could see what was just committed.
        store.remove(snapshot.path)
        raise
    return snapshot


def _check_there(store: Store, files: Collection[StoredFile]) -> None:
    missing = missing_files(store, files)
    if missing:
        # Those of a run killed long ago look unused until this one writes beside them.
        raise IncompleteRunError(
            f"{len(missing)} files of this run or an unfinished one are gone, {missing[0]} is one: "
            "the store was vacuumed meanwhile. Nothing was committed; run the same command again"
        )
