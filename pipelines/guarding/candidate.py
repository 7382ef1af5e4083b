"""What a run would commit, for whoever approves it.

Knows nothing of what is fit to be committed.
"""

from dataclasses import dataclass

from pipelines.counts import Counts
from pipelines.snapshots import Snapshot, StoredFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A snapshot that is not committed yet, and what is new in it."""

    snapshot: Snapshot
    """What would be committed."""
    parent: Snapshot | None
    """The snapshot before it; None if there is none."""
    encoded: tuple[StoredFile, ...]
    """Embeddings that this run, or one of the same plan that did not finish, encoded. The
    snapshot's own files may hold them among rows that were there before."""
    counts: Counts
    """The plan before the run."""
    num_rejected: int
    """Rejects of the plan, by this run and by those that did not finish."""
