"""Runs a pass and watches it: shows progress, counts rejects, stops where there are too many.

Knows nothing of snapshots, nor of why rows are due.
"""

from collections.abc import Callable, Sequence
from functools import partial

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import TooManyRejectsError
from pipelines.ledger import Counts, Ledger
from pipelines.progress import GPU_STAGES, STAGES, Progress, ProgressBoard, polled
from pipelines.snapshots import StoredFile
from pipelines.stages import Pass, run_stages

# Fewer rejects than this never stop a run: a share of a handful of rows says nothing.
MIN_REJECTS_TO_STOP = 20


def run_pass(
    pass_: Pass,
    *,
    ledger: Ledger,
    counts: Counts,
    staged: Sequence[StoredFile],
    on_progress: Callable[[Counts, Progress], None] | None,
) -> tuple[list[StoredFile], Progress]:
    """Embed all due rows; returns the files that were written, and what the stages did.

    Args:
        pass_: From where, with what, to where.
        ledger: Settled; says which rows.
        counts: Its numbers.
        staged: Files of an unfinished run of the same plan: their rejects count too.
        on_progress: Called about twice a second, from another thread.

    Raises:
        TooManyRejectsError: See `RowLimits.max_reject_share`.
    """
    # On the driver's node: a worker that may be lost at any time would take the counts along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    stages = GPU_STAGES if pass_.execution.decoder == "gpu" else STAGES
    board = ProgressBoard.options(  # type: ignore[attr-defined]
        scheduling_strategy=here
    ).remote(stages)
    written: list[StoredFile] = []
    num_planned = sum(counts.num_due.values()) + sum(file.num_rows for file in staged)
    num_rejected = _num_rejects(staged)
    with polled(board, partial(on_progress, counts) if on_progress else None):
        for files in run_stages(pass_, due=ledger.due(), board=board):
            written += files
            num_rejected += _num_rejects(files)
            _check_rejects(num_rejected, pass_=pass_, num_planned=num_planned)
    progress: Progress = ray.get(board.progress.remote())
    ray.kill(board)
    return written, progress


def _num_rejects(files: Sequence[StoredFile]) -> int:
    return sum(file.num_rows for file in files if file.kind == "rejects")


def _check_rejects(num_rejected: int, *, pass_: Pass, num_planned: int) -> None:
    bound = pass_.limits.max_reject_share
    # Against all rows of the plan, not those seen so far: the bad ones may come first.
    if num_rejected > max(bound * num_planned, MIN_REJECTS_TO_STOP - 1):
        folder = pass_.store.full_path(f"rejects/{pass_.plan_id}")
        raise TooManyRejectsError(
            f"{num_rejected} of {num_planned} rows rejected: more than {bound:.1%}. Nothing was "
            f"committed; the rejects with their reasons are in {folder}. Mend the catalog, or "
            "accept more with --max-reject-share; what was embedded is kept"
        )
