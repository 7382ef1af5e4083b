"""Tests of pipelines/runs/run_speed.py."""

import dataclasses

import pytest

from pipelines.runs.run_records import RunNumbers
from pipelines.runs.run_speed import MAX_PAST_RUNS, slow_line
from tests.recorded_runs import record

# Median 6,000 rows/s; slower than 4,800 is slow.
PAST = [record(1, speed=5_000), record(2, speed=6_000), record(3, speed=7_000)]


def numbers(**changes) -> RunNumbers:
    found = record(9, **changes).numbers
    assert found is not None
    return found


def test_a_slow_run_is_told_from_its_past():
    line = slow_line(numbers(speed=4_500), PAST)
    assert line is not None
    assert line.startswith("4,500 rows/s from the first batch on, 25% below 6,000, the median of")
    assert "the last 3 runs like it" in line
    assert line.endswith(f"like {PAST[1].run_id}")


@pytest.mark.parametrize(("speed", "is_slow"), [(4_790, True), (4_800, False), (9_000, False)])
def test_the_bound_is_a_fifth_below_the_median(speed, is_slow):
    assert (slow_line(numbers(speed=speed), PAST) is not None) == is_slow


def test_two_runs_are_no_past():
    assert slow_line(numbers(speed=100), PAST[1:]) is None


@pytest.mark.parametrize(
    "other",
    [
        {"engine_id": "fp16-0011223344556677"},
        {"backend": "torch"},
        {"decoder": "cpu"},
        {"steady_seconds": 9.9},
        {"steady_rows": 480_000 * 5},
        {"steady_rows": 480_000 // 6},
    ],
)
def test_runs_of_another_kind_do_not_count(other):
    unlike = record(3, **other)
    assert slow_line(numbers(speed=4_500), [*PAST[:2], unlike]) is None
    assert slow_line(numbers(speed=4_500), [*PAST, unlike, unlike]) is not None


def test_runs_that_did_not_end_do_not_count():
    failed = dataclasses.replace(record(3), status="failed", numbers=None)
    assert slow_line(numbers(speed=4_500), [*PAST[:2], failed]) is None


def test_a_short_run_is_not_judged():
    short = numbers(steady_seconds=9.0, steady_rows=9_000)
    assert slow_line(short, [record(n, steady_rows=9_000) for n in (1, 2, 3)]) is None
    idle = numbers(steady_seconds=0.0, steady_rows=0)
    assert slow_line(idle, PAST) is None


def test_what_was_long_ago_does_not_count():
    old = [record(1, speed=20_000)] * (MAX_PAST_RUNS + 5)
    recent = [record(2, speed=6_000)] * MAX_PAST_RUNS
    assert slow_line(numbers(speed=5_500), [*old, *recent]) is None
    assert slow_line(numbers(speed=5_500), old) is not None


def test_fewer_encoders_are_named_as_the_cause():
    line = slow_line(numbers(speed=3_000, num_encoders=1), PAST)
    assert "(1 encoders, then 2)" in line
