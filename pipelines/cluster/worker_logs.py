"""Keeps credentials out of what Ray's workers write, which Ray stores and its dashboard shows.

Knows nothing of what is written. A setup hook of Ray's runtime environments would do it too, but
there is one for all, it may be another's, and Ray's client has none.
"""

from ray._private.worker import WORKER_MODE, global_worker

from engine.process_redaction import redact_process


def redact_worker() -> None:
    """To be called where a task or an actor begins; nothing is done but in a worker of Ray."""
    if global_worker.mode == WORKER_MODE:
        redact_process()
