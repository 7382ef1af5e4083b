"""Values that Arrow holds and Python has no type for."""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from pipelines.indexes.carried_values import check_values, first_value

LARGE = 2**62
BAD_TEXT = pa.array([b"caf\xe9"]).view(pa.string())


def numbers(value: int, type_: pa.DataType) -> pa.Array:
    return pa.array([value], pa.int32() if type_.bit_width == 32 else pa.int64()).view(type_)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (numbers(253402300800, pa.timestamp("s")), "10000-01-01 00:00:00"),
        (numbers(253402300800, pa.timestamp("s", "UTC")), "10000-01-01 00:00:00Z"),
        (numbers(0, pa.timestamp("s", "Nowhere/Town")), "1970-01-01 00:00:00Z"),
        (numbers(LARGE, pa.timestamp("us")), LARGE),
        (numbers(-LARGE, pa.timestamp("s", "UTC")), -LARGE),
        (numbers(2**31 - 1, pa.date32()), 2**31 - 1),
        (numbers(LARGE, pa.date64()), LARGE),
        (numbers(LARGE, pa.time64("us")), LARGE),
        (numbers(LARGE, pa.duration("s")), str(LARGE)),
        (BAD_TEXT, "caf\ufffd"),
        (BAD_TEXT.dictionary_encode(), "caf\ufffd"),
        (pa.array([datetime(2026, 3, 1, tzinfo=UTC)]), datetime(2026, 3, 1, tzinfo=UTC)),
        (pa.array(["a"]).dictionary_encode(), "a"),
        (pa.array([None], pa.timestamp("s", "Nowhere/Town")), None),
        (pa.array([[1, 2]]), [1, 2]),
        (pa.array([[LARGE]], pa.list_(pa.int64())).cast(pa.list_(pa.duration("s"))), None),
    ],
)
def test_every_value_has_a_form(column: pa.Array, value: Any):
    check_values(column)
    assert first_value(column) == value


def test_what_lies_outside_of_its_buffers_is_still_found():
    offsets = pa.array([0, 99, 3], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"abc")])
    with pytest.raises(pa.ArrowException):
        check_values(column)
    indices = pa.array([5], pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["a"]), safe=False)
    with pytest.raises(pa.ArrowException):
        check_values(column)
