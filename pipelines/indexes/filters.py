"""Conditions on an index's columns: how they are written, and which ids they allow.

Knows nothing of vectors. Conditions on `key` are as those on carried columns. Null matches nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import schema
from pipelines.errors import QueryError, UnknownColumnError
from pipelines.indexes.comparisons import Matcher, NotComparableError, Value, matcher
from pipelines.indexes.comparisons import Operator as Operator
from pipelines.indexes.rows import RowTable, packed
from pipelines.indexes.shown import shown

OPERATORS: tuple[Operator, ...] = get_args(Operator)
_SIGNS: Mapping[str, Operator] = {
    "=": "eq",
    "==": "eq",
    ">=": "ge",
    ">": "gt",
    "<=": "le",
    "<": "lt",
}
_CONDITION = re.compile(r"(.*?)\s*(>=|<=|!=|==|=|>|<)\s*(.*)", re.DOTALL)
_BAR = re.compile(r"(?<!\\)\|")
FORMS = "write COLUMN=VALUE, COLUMN=VALUE|VALUE, or one of >=, >, <= and < for ="


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What a row's column must be; several conditions all hold."""

    column: str
    """Carried, or `key`."""
    operator: Operator
    """How the column compares with the value; `in`: it equals one of the values."""
    value: Value | tuple[Value, ...]
    """Several for `in`; dates and times in ISO 8601. All may also be given as text."""

    def __post_init__(self) -> None:
        """Check what needs no look at the columns."""
        if not isinstance(self.column, str) or not self.column:
            raise QueryError(f"a condition's column is {shown(self.column)}; name a column")
        if self.operator not in OPERATORS:
            raise QueryError(
                f"condition on {shown(self.column)}: operator={shown(self.operator)}: expected "
                f"one of {', '.join(OPERATORS)}"
            )
        if isinstance(self.value, tuple) != (self.operator == "in") or self.value == ():
            expected = "a list of at least one value" if self.operator == "in" else "one value"
            raise QueryError(
                f"condition on {shown(self.column)}: {self.operator} takes {expected}, not "
                f"{shown(self.value)}"
            )
        for value in self.values:
            if not isinstance(value, str | int | float):
                what = f"{shown(value)}; expected a text, a number, true or false"
            elif isinstance(value, float) and not math.isfinite(value):
                what = f"{value}; expected a finite number"
            elif isinstance(value, str) and not value.isascii() and not _is_unicode(value):
                what = f"{shown(value)}, which is no valid Unicode"
            else:
                continue
            raise QueryError(f"condition on {shown(self.column)}: a value is {what}")

    @property
    def values(self) -> tuple[Value, ...]:
        """All values."""
        return self.value if isinstance(self.value, tuple) else (self.value,)


def parse_condition(text: str) -> Condition:
    r"""A condition as it is written on a command line.

    `brand=acme`, `brand=acme|bolt` (one of them; a bar in a value is `\|`), `price>=10` and the
    like. Blanks around the sign don't count. ValueError for anything else.
    """
    found = _CONDITION.fullmatch(text)
    if found is None or found[2] == "!=" or not found[1].strip():
        raise QueryError(f"condition {shown(text)} can't be read; {FORMS}")
    column, sign, value = found[1].strip(), found[2], found[3].strip()
    operator = _SIGNS[sign]
    if operator == "eq":
        values = tuple(part.replace("\\|", "|") for part in _BAR.split(value))
        if len(values) > 1:
            return Condition(column=column, operator="in", value=values)
        value = values[0]
    return Condition(column=column, operator=operator, value=value)


def conditions_from_json(records: object) -> tuple[Condition, ...]:
    """Conditions from JSON: [{"column": "price", "operator": "ge", "value": 10}, ...].

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(records, list):
        raise QueryError(f"where is {shown(records)}; expected a list of conditions")
    return tuple(_condition_from_json(record) for record in records)


def _condition_from_json(record: Any) -> Condition:
    names = {"column", "operator", "value"}
    if not isinstance(record, dict) or record.keys() != names:
        raise QueryError(
            f"a condition is {shown(record)}; expected such as "
            '{"column": "price", "operator": "ge", "value": 10}'
        )
    value = record["value"]
    return Condition(
        column=record["column"],
        operator=record["operator"],
        value=tuple(value) if isinstance(value, list) else value,
    )


def allowed_ids(rows: RowTable, conditions: Sequence[Condition]) -> NDArray[np.uint8]:
    """A bitmap over ids of the rows that all conditions hold for: bit i & 7 of byte i >> 3.

    Raises:
        UnknownColumnError: There is no such column.
        ValueError: A column cannot be compared with the value.
        StoreError: The table is damaged.
    """
    tests = [(condition.column, _test(rows.schema, condition)) for condition in conditions]
    parts = [np.zeros(0, dtype=np.uint8)]
    for number in range(rows.num_batches):
        allowed = rows.column(schema.KEY, number).is_valid()
        for name, matches in tests:
            holds = matches(rows.column(name, number))
            allowed = pc.and_(allowed, pc.fill_null(holds, False))
        parts.append(packed(allowed))
    return np.concatenate(parts)


def _test(columns: pa.Schema, condition: Condition) -> Matcher:
    name = condition.column
    if name not in columns.names:
        raise UnknownColumnError(
            f"there is no column {shown(name)} to filter by (there are: "
            f"{', '.join(columns.names)}); `clipmill embed --carry COLUMN` brings others from "
            "the catalog"
        )
    type_ = columns.field(name).type
    try:
        return matcher(type_, condition.operator, condition.values)
    except NotComparableError as error:
        asked = shown(condition.value)
        raise QueryError(
            f"column {name!r} ({type_}) {error}; {condition.operator} {asked} was asked for"
        ) from error


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
