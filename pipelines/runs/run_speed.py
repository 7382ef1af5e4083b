"""Compares a run's speed with that of earlier runs of the same kind.

Knows nothing of where records are kept.

Compared are rows a second from the first encoded batch to the end of the stages, so that the start
of encoders, which takes seconds however much there is to do, does not count.
"""

import statistics
from collections.abc import Sequence

from pipelines.runs.run_records import RunNumbers, RunRecord

MIN_PAST_RUNS = 3
# Of those that are like: what a machine did a year ago says nothing of today's.
MAX_PAST_RUNS = 20
# Progress is on record about once a second; over less than this its steps would decide.
MIN_STEADY_SECONDS = 10.0
# Rows that left the encoders, in proportion: a night of few rows reads as many files as one of
# more, so that runs of another size have another speed.
MAX_WORK_RATIO = 4.0
MIN_SPEED_SHARE = 0.8


def slow_line(run: RunNumbers, past: Sequence[RunRecord]) -> str | None:
    """A line if a run was slower than MIN_SPEED_SHARE of the median of earlier ones like it.

    Args:
        run: The run.
        past: Earlier runs of the same store, the newest last. Like it are those that ended well,
            with the same engine, backend and decoder, and of like work; see the constants.

    Returns:
        None if it was not, or if there are not enough runs to tell.
    """
    like = [record for record in past if _is_like(record, run)][-MAX_PAST_RUNS:]
    speed = run.steady_rows_per_second
    if speed is None or not _is_long(run) or len(like) < MIN_PAST_RUNS:
        return None
    median = statistics.median(_speed(record) for record in like)
    if speed >= MIN_SPEED_SHARE * median:
        return None
    nearest = min(like, key=lambda record: abs(_speed(record) - median))
    assert nearest.numbers is not None  # what is like has them
    encoders = (run.num_encoders, nearest.numbers.num_encoders)
    fewer = f" ({encoders[0]} encoders, then {encoders[1]})" if encoders[0] != encoders[1] else ""
    return (
        f"{speed:,.0f} rows/s from the first batch on{fewer}, {1 - speed / median:.0%} below "
        f"{median:,.0f}, the median of the last {len(like)} runs like it (same engine, backend and "
        f"decoder, at most {MAX_WORK_RATIO:g} times as many rows or as few); like {nearest.run_id}"
    )


def _is_like(record: RunRecord, run: RunNumbers) -> bool:
    numbers = record.numbers
    if numbers is None or not _is_long(numbers) or not run.steady_rows:
        return False
    is_same = (numbers.engine_id, numbers.backend, numbers.decoder) == (
        *(run.engine_id, run.backend, run.decoder),
    )
    ratio = numbers.steady_rows / run.steady_rows
    return is_same and 1 / MAX_WORK_RATIO <= ratio <= MAX_WORK_RATIO


def _is_long(numbers: RunNumbers) -> bool:
    return numbers.steady_seconds >= MIN_STEADY_SECONDS


def _speed(record: RunRecord) -> float:
    assert record.numbers is not None  # of those that are like
    return record.numbers.steady_rows_per_second or 0.0
