"""Versions of rows as text: one value, one text, however a file of the catalog stores it.

Knows nothing of rows. Stores hold fingerprints of these texts: another text embeds its row again.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_FRACTION_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}


def version_texts(column: Any) -> Any:
    """The column as strings, as Arrow casts it but for two kinds of value.

    Floats without a fraction are written like integers, which pandas turns to floats where one is
    missing. Timestamps have nine digits of a second, whatever the unit; those with a time zone are
    of UTC.

    Args:
        column: Array or ChunkedArray of strings, numbers or times; a dictionary of them too.

    Raises:
        pa.ArrowException: Arrow casts none of them to strings.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        return _float_texts(column)
    if pa.types.is_timestamp(column.type):
        return _timestamp_texts(column)
    return column.cast(pa.string())


def _float_texts(column: Any) -> Any:
    values = column.cast(pa.float64())
    is_integer = pc.and_(pc.equal(values, pc.trunc(values)), pc.less(pc.abs(values), 2.0**63))
    integers = pc.if_else(is_integer, values, pa.scalar(None, pa.float64())).cast(pa.int64())
    return pc.coalesce(integers.cast(pa.string()), column.cast(pa.string()))


def _timestamp_texts(column: Any) -> Any:
    unit, zone = column.type.unit, column.type.tz
    if zone:
        column = column.cast(pa.timestamp(unit, "UTC"))
    num_digits = _FRACTION_DIGITS[unit]
    end = ("" if num_digits else ".") + "0" * (9 - num_digits) + ("Z" if zone else "")
    texts = pc.utf8_rtrim(column.cast(pa.string()), "Z")
    # Not as nanoseconds: these end in the year 2262, before what stands for "never".
    return pc.binary_join_element_wise(texts, end, "")
