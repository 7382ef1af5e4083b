"""Tests of pipelines/versions.py."""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from pipelines.versions import version_texts


def texts(values: list[Any], type_: pa.DataType) -> list[str | None]:
    (of_array, of_chunks) = (
        version_texts(column)
        for column in (pa.array(values, type_), pa.chunked_array([pa.array(values, type_)]))
    )
    assert of_chunks.combine_chunks() == of_array
    return of_array.to_pylist()


@pytest.mark.parametrize(
    ("values", "type_", "expected"),
    [
        (["v1", None, ""], pa.string(), ["v1", None, ""]),
        (["v1", None, ""], pa.large_string(), ["v1", None, ""]),
        (["v1", None, ""], pa.string_view(), ["v1", None, ""]),
        ([7, None, -1], pa.int8(), ["7", None, "-1"]),
        ([7, None, 2**63 - 1], pa.int64(), ["7", None, str(2**63 - 1)]),
        ([2**64 - 1], pa.uint64(), [str(2**64 - 1)]),
        ([1.5, None, float("nan")], pa.float64(), ["1.5", None, "nan"]),
        ([0.1], pa.float32(), ["0.1"]),
        ([datetime(2026, 3, 1).date()], pa.date32(), ["2026-03-01"]),
        ([datetime(2026, 3, 1)], pa.timestamp("ns"), ["2026-03-01 00:00:00.000000000"]),
        (
            [datetime(2026, 3, 1, tzinfo=UTC)],
            pa.timestamp("ns", "UTC"),
            ["2026-03-01 00:00:00.000000000Z"],
        ),
    ],
    ids=lambda of: str(of) if isinstance(of, pa.DataType) else "",
)
def test_the_texts_are_these_and_stay_so(values, type_, expected):
    # A store on disk holds hashes of these: another text would embed the row again.
    assert texts(values, type_) == expected
    if not pa.types.is_string_view(type_):
        dictionary = pa.array(values, type_).dictionary_encode()
        assert version_texts(dictionary).to_pylist() == expected


def test_integers_that_became_floats_are_still_the_same_versions():
    integers = [0, -3, 10**10, 1_700_000_000_123_456, 2**53]
    expected = [str(number) for number in integers]
    assert texts(integers, pa.int64()) == expected
    assert texts([*map(float, integers), None], pa.float64()) == [*expected, None]
    assert texts([1.0, 2.0], pa.float16()) == texts([1, 2], pa.int8())
    assert texts([1e300, float("inf")], pa.float64()) == ["1e+300", "inf"]


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin", "+05:30"])
def test_a_time_has_one_text_whatever_its_unit(zone):
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC if zone else None)
    expected = "2026-03-01 12:00:00.000000000" + ("Z" if zone else "")
    for unit in ("s", "ms", "us", "ns"):
        assert texts([noon, None], pa.timestamp(unit, zone)) == [expected, None]
    fine = noon.replace(microsecond=123_450)
    assert len({*texts([fine], pa.timestamp("us", zone)), *texts([fine], pa.timestamp("ns"))}) == (
        2 if zone else 1
    )


def test_a_time_that_stands_for_never_is_one_too():
    never = [datetime(9999, 12, 31)]
    assert texts(never, pa.timestamp("us")) == ["9999-12-31 00:00:00.000000000"]
