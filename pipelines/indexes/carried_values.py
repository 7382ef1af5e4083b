"""Checks values of carried columns, and gives them as Python values, whatever a catalog holds.

Knows nothing of tables. What Arrow holds and Python has no type for is given in another form: a
time beyond the year 9999 as text or a number, a text that is not UTF-8 with its bad bytes replaced.
"""

from typing import Any

import pyarrow as pa

# Of one value that has no Python type: years beyond 9999, unknown time zones, bad UTF-8.
_NO_PYTHON_VALUE = (ArithmeticError, LookupError, ValueError, pa.ArrowException)
_OUT_OF_RANGE = "<value out of range"


def check_values(column: pa.Array) -> None:
    """See that a column lies within its buffers; its values may be any. Raises ArrowException."""
    try:
        column.validate(full=True)
    except pa.ArrowException:
        stored = _as_stored(column)
        if stored is column:
            raise
        stored.validate(full=True)


def first_value(column: pa.Array) -> Any:
    """The first value of a column that was checked, as one of Python; None if there is no form."""
    try:
        return column[0].as_py()
    except _NO_PYTHON_VALUE:
        pass
    if pa.types.is_dictionary(column.type):
        index = column.indices[0].as_py()
        return first_value(column.dictionary.slice(index, 1))
    value = _as_stored(column)[0]
    if isinstance(value, pa.BinaryScalar):
        return value.as_py().decode(errors="replace")
    if not pa.types.is_temporal(column.type):
        return None
    text = _time_text(column)
    return value.as_py() if text is None else text


def _time_text(column: pa.Array) -> str | None:
    type_ = column.type
    if pa.types.is_timestamp(type_):
        # Without the time zone, which may be unknown: what is stored is of UTC.
        column = column.view(pa.timestamp(type_.unit))
    try:
        text = str(column.cast(pa.string())[0].as_py())
    except _NO_PYTHON_VALUE:
        return None
    if text.startswith(_OUT_OF_RANGE):
        return None
    is_utc = pa.types.is_timestamp(type_) and type_.tz is not None
    return f"{text}Z" if is_utc else text


def _as_stored(column: pa.Array) -> pa.Array:
    """A column of values that are all valid if they lie within the buffers; else the column."""
    type_ = column.type
    if pa.types.is_dictionary(type_):
        values = _as_stored(column.dictionary)
        if values is column.dictionary:
            return column
        return pa.DictionaryArray.from_arrays(column.indices, values)
    if pa.types.is_string(type_):
        return column.view(pa.binary())
    if pa.types.is_large_string(type_):
        return column.view(pa.large_binary())
    if pa.types.is_temporal(type_) and type_.bit_width in (32, 64):
        return column.view(pa.int32() if type_.bit_width == 32 else pa.int64())
    return column
