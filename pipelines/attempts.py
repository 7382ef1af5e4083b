"""How often Ray began the task at hand before: its worker died, or the node was lost.

Knows nothing of what the task does.

Ray counts for each task, so that a run to which nothing happens pays nothing for it, and what is
known of a task's deaths is kept where the task is: with the driver, whichever nodes are lost.
"""

import ray
from ray._private.state import actors
from ray._private.worker import WORKER_MODE, global_worker

from pipelines.errors import WorkerDeathError

# Begun so often before without an end, a task does its work in a process that may die of it.
SUSPECT_ATTEMPTS = 2
# More deaths of one task end the run: the process that may die is not what dies.
MAX_ATTEMPTS = 6


def num_attempts() -> int:
    """Times that the task of this thread was begun before; 0 outside of Ray's workers."""
    if global_worker.mode != WORKER_MODE:
        return 0
    worker = global_worker.core_worker  # type: ignore[attr-defined]
    return int(worker.get_current_task_attempt_number())


def was_restarted() -> bool:
    """Whether this process took the place of an actor that died."""
    actor = actors(actor_id=ray.get_runtime_context().get_actor_id())
    return bool(actor and actor["NumRestarts"])


def is_suspect() -> bool:
    """Whether the task of this thread may be what its workers died of."""
    return num_attempts() >= SUSPECT_ATTEMPTS


def check_attempts(work: str) -> None:
    """Raise WorkerDeathError if the task of this thread was begun too often.

    Args:
        work: What it does, for the message.
    """
    if num_attempts() >= MAX_ATTEMPTS:
        raise WorkerDeathError(
            f"{work}: {num_attempts()} workers died while they were at it, or their nodes were "
            "lost. What was written is kept; see why in the logs of Ray (out of memory? fewer "
            "--batch-rows or --num-encoders take less), then run the same command again"
        )
