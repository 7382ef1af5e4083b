"""Compares a column with values of a condition, exactly, whatever the column's type.

Knows nothing of rows, ids or how a condition is written.

What is discrete (integers, decimals, dates, timestamps) is compared in its own steps: `>= 2.5` of
integers is `>= 3`. What is floating is compared with the value as the column would hold it: 0.1 is
found in a float32 column.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction
from functools import partial
from math import ceil, floor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Operator = Literal["eq", "in", "ge", "gt", "le", "lt"]
Kind = Literal["string", "integer", "number", "boolean", "time", "other"]
Value = str | int | float | bool
# Of an array of the column: booleans, of which null stands for no.
Matcher = Callable[[pa.Array], pa.Array]

# Beyond float64; an exponent without bound would be an integer without bound.
MAX_EXPONENT = 400
MAX_DIGITS = 400
_EXACT = Context(prec=100)
_EPOCH = datetime(1970, 1, 1)
_DAY_SECONDS = 86_400
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# Python keeps microseconds.
_SECOND_FRACTION = re.compile(r"(?<=:\d\d:\d\d)[.,](\d{1,12})")


class NotComparableError(ValueError):
    """A value cannot be compared with a column; the message says what could be."""


def kind_of(type_: pa.DataType) -> Kind:
    """What a column holds, for who asks for it; `other` can't be asked for."""
    types = pa.types
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "string"
    if types.is_integer(type_):
        return "integer"
    if types.is_floating(type_) or types.is_decimal(type_):
        return "number"
    if types.is_boolean(type_):
        return "boolean"
    return "time" if types.is_timestamp(type_) or types.is_date(type_) else "other"


def matcher(type_: pa.DataType, operator: Operator, values: Sequence[Value]) -> Matcher:
    """What finds the cells of a column that an operator holds for.

    Args:
        type_: Of the column.
        operator: `eq` and `in` hold for a cell that equals one of the values.
        values: One, or for `in` at least one; as text also what is not text.

    Raises:
        NotComparableError: The column's type is none to compare with, or such values are not.
    """
    kind = kind_of(type_)
    if kind == "other":
        raise NotComparableError("is nested or of a type that can't be compared; name another")
    if kind == "boolean" and operator not in ("eq", "in"):
        raise NotComparableError("compares with `=` only")
    if kind == "string":
        texts = [_text(value) for value in values]
        cast = pa.string() if pa.types.is_string_view(type_) else type_
        return _plain_matcher(cast, operator, texts)
    if kind == "boolean":
        return _plain_matcher(type_, operator, [_boolean(value) for value in values])
    if pa.types.is_floating(type_):
        cast = pa.float32() if pa.types.is_float16(type_) else type_
        return _plain_matcher(cast, operator, [_rounded(value, type_) for value in values])
    steps = _steps_of(type_)
    numbers = [steps.number(value) for value in values]
    return _step_matcher(steps, operator, numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steps:
    """A discrete type: what it holds are whole numbers of its steps."""

    number: Callable[[Value], Fraction]
    """A value in steps."""
    low: int
    """The least that the type holds."""
    high: int
    """The most."""
    cell: Callable[[int], pa.Scalar]
    """So many steps, as `cells` are."""
    cells: Callable[[pa.Array], pa.Array]
    """A column as what can be compared."""


def _steps_of(type_: pa.DataType) -> _Steps:
    if pa.types.is_decimal(type_):
        wide = type_
        if type_.bit_width < 128:
            wide = pa.decimal128(type_.precision, type_.scale)
        unit = Fraction(10) ** type_.scale
        high = 10**type_.precision - 1
        return _Steps(
            number=lambda value: _exact(value) * unit,
            low=-high,
            high=high,
            cell=lambda steps: pa.scalar(Decimal(steps).scaleb(-type_.scale, _EXACT), wide),
            cells=lambda column: column.cast(wide),
        )
    stored = type_
    number: Callable[[Value], Fraction] = _exact
    if pa.types.is_date(type_):
        stored = pa.int32() if pa.types.is_date32(type_) else pa.int64()
        days = 1 if pa.types.is_date32(type_) else _DAY_SECONDS * _UNITS["ms"]
        number = partial(_date, per_day=days)
    elif pa.types.is_timestamp(type_):
        stored = pa.int64()
        number = partial(_instant, has_zone=type_.tz is not None, per_second=_UNITS[type_.unit])
    limits = np.iinfo(stored.to_pandas_dtype())
    return _Steps(
        number=number,
        low=int(limits.min),
        high=int(limits.max),
        cell=lambda steps: pa.scalar(steps, stored),
        cells=lambda column: column.view(stored),
    )


def _step_matcher(steps: _Steps, operator: Operator, numbers: Sequence[Fraction]) -> Matcher:
    if operator in ("eq", "in"):
        cells = [
            steps.cell(int(number))
            for number in numbers
            if number.denominator == 1 and steps.low <= number <= steps.high
        ]
        if not cells:
            return _never
        return lambda column: pc.is_in(steps.cells(column), value_set=pa.array(cells))
    (number,) = numbers
    if operator in ("ge", "gt"):
        least = ceil(number) if operator == "ge" else floor(number) + 1
        if least > steps.high:
            return _never
        cell = steps.cell(max(least, steps.low))
        return lambda column: pc.greater_equal(steps.cells(column), cell)
    most = floor(number) if operator == "le" else ceil(number) - 1
    if most < steps.low:
        return _never
    cell = steps.cell(min(most, steps.high))
    return lambda column: pc.less_equal(steps.cells(column), cell)


def _plain_matcher(type_: pa.DataType, operator: Operator, values: Sequence[Any]) -> Matcher:
    if operator == "in":
        # For `is_in`, 0.0 and -0.0 are two.
        zeros = [0.0, -0.0] if pa.types.is_floating(type_) and 0.0 in values else []
        wanted = pa.array([*values, *zeros], type_)
        return lambda column: pc.is_in(column.cast(type_), value_set=wanted)
    (value,) = values
    cell = pa.scalar(value, type_)
    compare = {
        "eq": pc.equal,
        "ge": pc.greater_equal,
        "gt": pc.greater,
        "le": pc.less_equal,
        "lt": pc.less,
    }[operator]
    return lambda column: compare(column.cast(type_), cell)


def _never(column: pa.Array) -> pa.Array:
    return pa.nulls(len(column), pa.bool_())


def _text(value: Value) -> str:
    if not isinstance(value, str):
        raise NotComparableError("compares with text, such as 'acme'")
    return value


def _boolean(value: Value) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise NotComparableError("compares with true or false")


def _decimal(value: Value) -> Decimal:
    if not isinstance(value, bool):
        try:
            number = Decimal(str(value)) if len(str(value)) <= MAX_DIGITS else Decimal("NaN")
        except (InvalidOperation, ValueError):
            number = Decimal("NaN")
        if number.is_finite() and abs(number.adjusted()) <= MAX_EXPONENT:
            return number
    raise NotComparableError("compares with numbers, such as 10")


def _exact(value: Value) -> Fraction:
    return Fraction(_decimal(value))


def _rounded(value: Value, type_: pa.DataType) -> float:
    with np.errstate(over="ignore"):
        return float(type_.to_pandas_dtype()(float(_decimal(value))))


def _date(value: Value, *, per_day: int) -> Fraction:
    try:
        return Fraction((date.fromisoformat(_text(value)) - _EPOCH.date()).days * per_day)
    except ValueError as error:
        raise NotComparableError("compares with dates, such as 2026-03-01") from error


def _instant(value: Value, *, has_zone: bool, per_second: int) -> Fraction:
    example = "2026-03-01T12:00:00" + ("Z" if has_zone else "")
    text = value if isinstance(value, str) else ""
    fraction = _SECOND_FRACTION.search(text)
    digits = fraction[1] if fraction else "0"
    try:
        instant = datetime.fromisoformat(_SECOND_FRACTION.sub("", text))
    except ValueError as error:
        raise NotComparableError(f"compares with times, such as {example}") from error
    if instant.tzinfo is not None:
        if not has_zone:
            raise NotComparableError(f"has no time zone; leave it off, as in {example}")
        offset = instant.utcoffset()
        assert offset is not None
        since = instant.replace(tzinfo=None) - _EPOCH - offset
    else:  # of a column with a zone: UTC
        since = instant - _EPOCH
    seconds = Fraction(since.days * _DAY_SECONDS + since.seconds) + Fraction(
        since.microseconds, 10**6
    )
    return (seconds + Fraction(int(digits), 10 ** len(digits))) * per_second
