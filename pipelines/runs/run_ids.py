"""Names runs, by when they began and so that no two are called alike, and their place in a store.

Knows nothing of what a run does.
"""

import uuid
from datetime import UTC, datetime

RUNS_DIR = "runs"


def new_run_id() -> str:
    """`20260301T031502-4fe2a1`: names sort as the runs began, in UTC."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
