"""Does what a ledger says is due, in rounds: copies, embeds, and looks at what that makes due.

Knows nothing of snapshots: what is written is staged.

Twins of a row can be copied once it is embedded, in a second round; if it is rejected, they are
embedded then, or rejected themselves. There is no third.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.copying import copy_embeddings
from pipelines.counts import Counts
from pipelines.errors import IncompleteRunError, TooManyRejectsError
from pipelines.ledger import Ledger
from pipelines.planning import add_stored, staged_reasons
from pipelines.progress import GPU_STAGES, STAGES, Progress, ProgressBoard, polled
from pipelines.schema import RETRYABLE_REASONS, Modality
from pipelines.snapshots import StoredFile
from pipelines.stages import Pass, run_stages
from pipelines.store import Store
from pipelines.writing import staging_dir

# Fewer rejects than this never stop a run: a share of a handful of rows says nothing.
MIN_REJECTS_TO_STOP = 20


@dataclass(kw_only=True, slots=True)
class Written:
    """What a run wrote."""

    copied: list[StoredFile] = field(default_factory=list)
    """Embeddings of contents that were embedded already."""
    encoded: list[StoredFile] = field(default_factory=list)
    """Embeddings and rejects."""
    progress: Progress | None = None
    """What the stages did; None if there was nothing for them."""

    @property
    def files(self) -> list[StoredFile]:
        """All of them."""
        return [*self.copied, *self.encoded]

    def num_copied(self, modalities: Iterable[Modality]) -> dict[Modality, int]:
        """Embeddings that were copied."""
        return {modality: _num_embeddings(self.copied, modality) for modality in modalities}

    def num_embedded(self, modalities: Iterable[Modality]) -> dict[Modality, int]:
        """Embeddings that were not."""
        return {modality: _num_embeddings(self.encoded, modality) for modality in modalities}

    @property
    def num_rejected(self) -> int:
        """Rejects of all modalities."""
        return _num_rejects(self.encoded)


def write_due(
    pass_: Pass,
    *,
    ledger: Ledger,
    counts: Counts,
    on_progress: Callable[[Counts, Progress], None] | None,
) -> Written:
    """Write an embedding or a reject for everything that is due.

    Args:
        pass_: From where, with what, to where.
        ledger: Settled; at the end it knows what was written, and nothing is due.
        counts: Of the ledger.
        on_progress: Called about twice a second while the stages run, from another thread.

    Raises:
        TooManyRejectsError: See `RowLimits.max_reject_share`.
        IncompleteRunError: Rows are missing at the end (files changed while they were read).
    """
    written = Written()
    board: Any = None
    num_rejected = ledger.num_rejected()
    shown = partial(on_progress, counts) if on_progress else None
    while any(ledger.num_due().values()):
        waiting = ledger.num_waiting()
        copied = list(
            copy_embeddings(
                ledger,
                rows_per_file=pass_.resources.rows_per_file,
                plan_id=pass_.plan_id,
                store=pass_.store,
            )
        )
        encoded: list[StoredFile] = []
        if due := ledger.due():
            board = board or _board(pass_)
            with (
                polled(board, shown),
                # Or it would go on for as long as someone holds what is raised here.
                closing(run_stages(pass_, due=due, board=board)) as written_files,
            ):
                for files in written_files:
                    encoded += files
                    num_rejected += _num_rejects(files)
                    check_rejects(
                        num_rejected,
                        counts=counts,
                        max_share=pass_.limits.max_reject_share,
                        store=pass_.store,
                        plan_id=pass_.plan_id,
                    )
        written.copied += copied
        written.encoded += encoded
        add_stored(ledger, [*copied, *encoded], store=pass_.store, staged=True)
        ledger.settle()
        still_due = ledger.num_due()
        is_short = any(still_due[modality] > num for modality, num in waiting.items())
        # What twins waited for is stored by now, if only as a reject; or it was other content.
        if is_short or any(ledger.num_waiting().values()):
            raise IncompleteRunError(
                f"{still_due} rows were planned but not written: the catalog changed while it "
                "was read. Nothing was committed; run the same command again, which embeds what "
                "the last snapshot lacks of the catalog as it is then"
            )
    if board:
        written.progress = ray.get(board.final_progress.remote())
        ray.kill(board)
    return written


def has_too_many_rejects(num_rejected: int, *, counts: Counts, max_share: float) -> bool:
    """Whether so many rejects of a plan stop it.

    Args:
        num_rejected: By this run, and by those of the same plan that did not finish.
        counts: Of the plan.
        max_share: `RowLimits.max_reject_share`.
    """
    # Those that are tried again were let pass before: that they fail again is no news.
    num_retried = sum(keys.num_retried for keys in counts.keys.values())
    # Against all rows of the plan, not those seen so far: the bad ones may come first.
    return num_rejected > max(max_share * counts.num_planned, MIN_REJECTS_TO_STOP - 1) + num_retried


def check_rejects(
    num_rejected: int, *, counts: Counts, max_share: float, store: Store, plan_id: str
) -> None:
    """Raise TooManyRejectsError if `has_too_many_rejects`, with reasons.

    Args:
        num_rejected: As there.
        counts: As there.
        max_share: As there.
        store: Where the rejects are staged.
        plan_id: Under which.
    """
    if not has_too_many_rejects(num_rejected, counts=counts, max_share=max_share):
        return
    reasons = staged_reasons(store, plan_id=plan_id)
    folder = store.full_path(staging_dir("rejects", plan_id=plan_id))
    lines = [
        f"{num_rejected} of {counts.num_planned} rows rejected: more than {max_share:.1%}. "
        "Nothing was committed; what was embedded is kept. Why:",
        *(f"  {reason}, such as: {detail}" for reason, detail in reasons.items()),
        f"All of them are in {folder}. If the catalog is mended, run the same command again. "
        "Accept more with --max-reject-share, or all with `nightly --accept rejects`",
    ]
    if retryable := [reason for reason in reasons if reason in RETRYABLE_REASONS]:
        lines.append(
            "If other options let them pass, try them again with `embed --retry "
            f"{' '.join(retryable)}` or `nightly --retry-rejects`"
        )
    raise TooManyRejectsError("\n".join(lines))


def _board(pass_: Pass) -> Any:
    # On the driver's node: a worker that may be lost at any time would take the counts along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    stages = GPU_STAGES if pass_.execution.decoder == "gpu" else STAGES
    return ProgressBoard.options(  # type: ignore[attr-defined]
        scheduling_strategy=here
    ).remote(stages)


def _num_embeddings(files: Iterable[StoredFile], modality: Modality) -> int:
    return sum(
        file.num_rows for file in files if file.kind == "embeddings" and file.modality == modality
    )


def _num_rejects(files: Sequence[StoredFile]) -> int:
    return sum(file.num_rows for file in files if file.kind == "rejects")
