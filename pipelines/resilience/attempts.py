"""How often Ray began the task at hand before, and what its workers died of.

Knows nothing of what the task does.

Ray counts for each task, so that a run to which nothing happens pays nothing for it. That count is
no verdict: it also rises where another call of the same worker was at fault, or where the node
went away. It says only when to take care: then work is done by itself, and the run's board knows
of each piece where it began and did not end. Of those places Ray tells which are no more.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import ray

# Ray tells the number of an attempt in no public way but by its dashboard, which may not run.
from ray._private.worker import WORKER_MODE, global_worker

from pipelines.errors import WorkerDeathError
from pipelines.progress import StageMeter

# Begun so often before without an end, a task does its work with care.
SUSPECT_ATTEMPTS = 2
# More deaths of workers that had this work alone end the run: no row is what they die of.
MAX_DEATHS = 4
# Of nodes that it was on. Spot nodes go at any time, but hardly so often at one piece of work.
MAX_LOST_NODES = 16
# Of a task without a board, of which nobody knows why it was begun again.
MAX_ATTEMPTS = SUSPECT_ATTEMPTS + MAX_LOST_NODES
# Of any task: its workers may also die where no piece of work is under way.
MAX_NOTED_ATTEMPTS = 64

_WAY_OUT = "What was written is kept; {}, then run the same command again"
_SEE_LOGS = _WAY_OUT.format(
    "see why in the logs of Ray (out of memory? fewer --batch-rows or --num-encoders take less)"
)
_SEE_NODES = _WAY_OUT.format("see why they went in the logs of Ray's head and of the cloud")


def num_attempts() -> int:
    """Times that the task of this thread was begun before; 0 outside of Ray's workers."""
    if global_worker.mode != WORKER_MODE:
        return 0
    worker = global_worker.core_worker  # type: ignore[attr-defined]
    return int(worker.get_current_task_attempt_number())


def was_restarted() -> bool:
    """Whether this process took the place of an actor that died."""
    with warnings.catch_warnings():
        # Ray itself asks by what it deprecated.
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def is_suspect() -> bool:
    """Whether the task of this thread may be what its workers died of."""
    return num_attempts() >= SUSPECT_ATTEMPTS


@contextmanager
def attempted(work: str, *, meter: StageMeter | None) -> Iterator[None]:
    """Do a piece of the task's work within the block, while the worker does nothing else.

    Args:
        work: What it is, for the message; no other piece of the task is called so.
        meter: Leads to the run's board; without one Ray's count has to do.

    Raises:
        WorkerDeathError: It was the end of too many workers, or was on too many nodes that went.
    """
    if not is_suspect():
        yield
        return
    if num_attempts() >= (MAX_ATTEMPTS if meter is None else MAX_NOTED_ATTEMPTS):
        raise WorkerDeathError(
            f"{work}: {num_attempts()} workers died while they were at it, or their nodes were "
            f"lost. {_SEE_LOGS}"
        )
    if meter is None:
        yield
        return
    context = ray.get_runtime_context()
    piece = f"{context.get_task_id()} {work}"
    begun_on = meter.begin(piece, node_id=context.get_node_id())
    try:
        check_deaths(work, begun_on=begun_on, alive=_nodes_alive())
        yield
    finally:
        meter.end(piece)


def check_deaths(work: str, *, begun_on: Sequence[str], alive: Collection[str]) -> None:
    """Raise WorkerDeathError if work was begun too often without an end.

    Args:
        work: What it is.
        begun_on: Ids of the nodes where it was.
        alive: Ids of the nodes that there are: on the others its worker did not die of it alone.
    """
    num_deaths = sum(node_id in alive for node_id in begun_on)
    if num_deaths >= MAX_DEATHS:
        raise WorkerDeathError(
            f"{work}: {num_deaths} workers died of it that did nothing else meanwhile, on nodes "
            f"that are still there. {_SEE_LOGS}"
        )
    num_lost = len(begun_on) - num_deaths
    if num_lost >= MAX_LOST_NODES:
        raise WorkerDeathError(
            f"{work}: {num_lost} nodes were lost while a worker of theirs was at it. {_SEE_NODES}"
        )


def _nodes_alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
