"""Conditions as they are written, and the ids they allow, with plain Python as the known answer."""

import math
import operator
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Context, Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import UnknownColumnError
from pipelines.indexes import row_writing, rows
from pipelines.indexes.comparisons import kind_of
from pipelines.indexes.filters import (
    Condition,
    allowed_ids,
    conditions_from_json,
    parse_condition,
)
from pipelines.indexes.row_writing import update_rows, write_rows
from pipelines.indexes.rows import RowTable

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
}
TEXTS = st.sampled_from(["", "a", "acme", "é", "z|y", "\U0001f600", "true", "10"])
DAYS = st.dates(date(1960, 1, 1), date(2100, 1, 1)) | st.sampled_from([date(2026, 3, 1)])
EDGES = [0, 1, -1, 127, 128, -128, 255, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1]
FLOATS = st.sampled_from([0.0, -0.0, 0.1, 2.5, -1.0, 65_504.0, math.inf, math.nan])
NUMBERS = (
    st.sampled_from([*EDGES, 2**64, -(2**200), 0.1, 2.5, -0.0, 1e300, "10", "0.1", " 7", "1e-3"])
    | st.integers(-3, 3)
    | st.decimals(-9, 9, places=3).map(str)
)
MOMENTS = st.datetimes(datetime(1960, 1, 1), datetime(2100, 1, 1)) | st.sampled_from(
    [datetime(2026, 3, 1), datetime(2026, 3, 1, 12, 30, 15, 500_000)]
)


def cut(moment: datetime) -> datetime:
    return moment.replace(microsecond=0)


def with_zone(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC)


def integers(type_: pa.DataType) -> st.SearchStrategy[int]:
    limits = np.iinfo(type_.to_pandas_dtype())
    inside = [edge for edge in EDGES if limits.min <= edge <= limits.max]
    return st.sampled_from(inside) | st.integers(max(-3, int(limits.min)), 3)


def decimals(precision: int, scale: int) -> st.SearchStrategy[Decimal]:
    high = 10**precision - 1
    return st.sampled_from([-high, high, 0, 100, 10]).map(
        lambda n: Decimal(n).scaleb(-scale, Context(prec=100))
    )


def as_held(value: Any, *, type_: pa.DataType) -> float:
    return float(type_.to_pandas_dtype()(float(value)))


# Type -> cells, values to ask for, and what both are compared as.
CASES: dict[pa.DataType, tuple[st.SearchStrategy[Any], st.SearchStrategy[Any], Any]] = {
    pa.string(): (TEXTS, TEXTS, str),
    pa.large_string(): (TEXTS, TEXTS, str),
    pa.string_view(): (TEXTS, TEXTS, str),
    **{
        type_: (integers(type_), NUMBERS, Fraction)
        for type_ in (pa.int8(), pa.int64(), pa.uint64(), pa.uint8())
    },
    **{
        type_: (
            FLOATS,
            NUMBERS.map(lambda value: float(value) if abs(float(value)) < 1e9 else 7),
            partial(as_held, type_=type_),
        )
        for type_ in (pa.float16(), pa.float32(), pa.float64())
    },
    pa.decimal128(9, 2): (decimals(9, 2), NUMBERS, lambda value: Fraction(str(value))),
    pa.decimal32(5, 1): (decimals(5, 1), NUMBERS, lambda value: Fraction(str(value))),
    pa.decimal128(38, 0): (decimals(38, 0), NUMBERS, lambda value: Fraction(str(value))),
    pa.decimal256(60, 5): (decimals(60, 5), NUMBERS, lambda value: Fraction(str(value))),
    pa.date32(): (DAYS, DAYS.map(str), lambda value: str(value)),
    pa.date64(): (DAYS, DAYS.map(str), lambda value: str(value)),
    pa.timestamp("s"): (
        MOMENTS.map(cut),
        MOMENTS.map(lambda value: value.isoformat()) | DAYS.map(str),
        lambda value: value if isinstance(value, datetime) else datetime.fromisoformat(value),
    ),
    pa.timestamp("us", "UTC"): (
        MOMENTS.map(with_zone),
        st.builds(
            lambda moment, hours: with_zone(moment + timedelta(hours=hours)).isoformat(),
            MOMENTS,
            st.integers(-3, 3),
        ),
        lambda value: value if isinstance(value, datetime) else datetime.fromisoformat(value),
    ),
}


@st.composite
def asked(draw: st.DrawFn, type_: pa.DataType) -> tuple[list[Any], Condition]:
    cells, values, _ = CASES[type_]
    column = draw(st.lists(st.none() | cells, min_size=1, max_size=20))
    sign = draw(st.sampled_from(["in", *COMPARE]))
    value = tuple(draw(st.lists(values, min_size=1, max_size=3))) if sign == "in" else draw(values)
    return column, Condition(column="x", operator=sign, value=value)


def expected(type_: pa.DataType, column: list[Any], condition: Condition) -> list[bool]:
    plain = CASES[type_][2]

    def holds(cell: Any, value: Any) -> bool:
        compare = COMPARE.get(condition.operator, operator.eq)
        return bool(compare(plain(cell), plain(value)))

    return [
        cell is not None and any(holds(cell, value) for value in condition.values)
        for cell in column
    ]


def check_condition(
    folder: Path, type_: pa.DataType, column: list[Any], condition: Condition
) -> None:
    keys = [str(number) for number in range(len(column))]
    cells = column
    if type_ == pa.float16():
        cells = [None if cell is None else np.float16(cell) for cell in column]
    write_rows(folder, [pa.table({"key": keys, "x": pa.array(cells, type_)})])
    bitmap = allowed_ids(RowTable(folder), [condition])
    found = np.unpackbits(bitmap, bitorder="little").astype(bool).tolist()
    assert found[: len(column)] == expected(type_, column, condition)
    assert not any(found[len(column) :])


@pytest.mark.parametrize("type_", CASES, ids=str)
@given(data=st.data())
@settings(max_examples=60)
def test_conditions_hold_as_in_python(
    tmp_path_factory: pytest.TempPathFactory, type_: pa.DataType, data: st.DataObject
):
    check_condition(tmp_path_factory.mktemp("rows"), type_, *data.draw(asked(type_)))


@pytest.mark.parametrize(
    ("type_", "column", "condition"),
    [
        (pa.int64(), [2**53, 2**53 + 1], Condition(column="x", operator="gt", value=2**53)),
        (pa.uint8(), [255, 0, None], Condition(column="x", operator="ge", value=-5)),
        (pa.float64(), [0.0, -0.0], Condition(column="x", operator="in", value=(0, 1))),
    ],
)
def test_conditions_at_the_limits_of_types(
    tmp_path: Path, type_: pa.DataType, column: list[Any], condition: Condition
):
    check_condition(tmp_path, type_, column, condition)


@pytest.fixture
def goods(tmp_path: Path) -> RowTable:
    """Ten products in batches of 8, of which id 3 is free."""
    moments = [datetime(2026, 3, day, 12, tzinfo=UTC) for day in range(1, 11)]
    columns = {
        "key": [f"k{number}" for number in range(10)],
        "brand": ["acme", "bolt"] * 5,
        "price": pa.array([None, *range(1, 10)], pa.int64()),
        "stock": [True, False] * 5,
        "at": pa.array(moments, pa.timestamp("ns", "UTC")),
        "day": pa.array(moments, pa.date32()),
        "local": pa.array([moment.replace(tzinfo=None) for moment in moments]),
        "tags": [["a"]] * 10,
        "blob": [b"a"] * 10,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BATCH_ROWS", 8)
        patch.setattr(row_writing, "BATCH_ROWS", 8)
        table = pa.table(columns)
        write_rows(tmp_path / "a", [table])
        update_rows(
            tmp_path / "b",
            parent=RowTable(tmp_path / "a"),
            removed_ids=np.array([3]),
            added=table.slice(0, 0),
        )
        yield RowTable(tmp_path / "b")


@pytest.mark.parametrize(
    ("conditions", "ids"),
    [
        ([], [0, 1, 2, 4, 5, 6, 7, 8, 9]),
        (["brand=acme"], [0, 2, 4, 6, 8]),
        (["brand=bolt"], [1, 5, 7, 9]),
        (["brand=acme|bolt", "price>=8"], [8, 9]),
        (["price<=1"], [1]),
        (["key=k3"], []),
        (["key=k2|k9|k3"], [2, 9]),
        (["stock=TRUE", "price<3"], [2]),
        (["at>=2026-03-09T14:00:00+02:00"], [8, 9]),
        (["at>2026-03-09T12:00:00.000000001"], [9]),
        (["at<2026-03-01T12:00:00,000000001Z"], [0]),
        (["day=2026-03-02|2026-03-05"], [1, 4]),
        (["local<2026-03-02"], [0]),
    ],
)
def test_a_bitmap_has_the_bits_of_faiss(goods: RowTable, conditions: list[str], ids: list[int]):
    bitmap = allowed_ids(goods, [parse_condition(text) for text in conditions])
    assert bitmap.dtype == np.uint8
    assert [row_id for row_id in range(16) if bitmap[row_id >> 3] >> (row_id & 7) & 1] == ids


@pytest.mark.parametrize(
    ("column", "sign", "value", "message"),
    [
        ("price", "ge", "cheap", r"column 'price' \(int64\) compares with numbers, such as 10"),
        ("price", "ge", True, "compares with numbers"),
        ("price", "ge", "nan", "compares with numbers"),
        ("price", "ge", "1e999999999", "compares with numbers"),
        ("price", "ge", "1" * 9_999, "compares with numbers"),
        ("brand", "eq", 5, r"\(string\) compares with text, such as 'acme'; eq 5 was asked"),
        ("stock", "eq", "yes", "compares with true or false"),
        ("stock", "ge", True, "compares with `=` only"),
        ("at", "ge", "yesterday", "compares with times, such as 2026-03-01T12:00:00Z"),
        ("at", "ge", 2026, "compares with times"),
        ("local", "ge", "2026-03-01T12:00:00Z", "has no time zone; leave it off, as in 2026-"),
        ("day", "ge", "2026-03-01T12:00", "compares with dates, such as 2026-03-01"),
        ("day", "ge", 20_260_301, "compares with dates"),
        ("tags", "eq", "a", r"column 'tags' \(list<.*\) is nested or of a type"),
        ("blob", "eq", "a", "'blob' .* is nested or of a type"),
    ],
)
def test_what_cannot_be_compared_is_said(
    goods: RowTable, column: str, sign: Any, value: Any, message: str
):
    with pytest.raises(ValueError, match=message):
        allowed_ids(goods, [Condition(column=column, operator=sign, value=value)])


def test_an_unknown_column_names_those_there_are(goods: RowTable):
    with pytest.raises(UnknownColumnError, match=r"'colour' .*there are: key, brand, price"):
        allowed_ids(goods, [parse_condition("colour=red")])


@pytest.mark.parametrize(
    ("text", "column", "sign", "value"),
    [
        ("brand=acme", "brand", "eq", "acme"),
        ("brand == acme", "brand", "eq", "acme"),
        ("brand=acme|bolt", "brand", "in", ("acme", "bolt")),
        (r"brand=a\|b|c", "brand", "in", ("a|b", "c")),
        (r"brand=a\|b", "brand", "eq", "a|b"),
        ("brand=", "brand", "eq", ""),
        ("price >= 10", "price", "ge", "10"),
        ("price>10", "price", "gt", "10"),
        ("price<=10", "price", "le", "10"),
        ("price<10", "price", "lt", "10"),
        ("name=a>=b", "name", "eq", "a>=b"),
        ("list price<3", "list price", "lt", "3"),
    ],
)
def test_conditions_are_read(text: str, column: str, sign: Any, value: Any):
    assert parse_condition(text) == Condition(column=column, operator=sign, value=value)


@pytest.mark.parametrize("text", ["", "brand", "=acme", "brand!=acme", " >3"])
def test_what_is_no_condition_is_said(text: str):
    with pytest.raises(ValueError, match=r"can't be read; write COLUMN=VALUE"):
        parse_condition(text)


def test_conditions_from_json():
    assert conditions_from_json(
        [
            {"column": "price", "operator": "ge", "value": 10},
            {"column": "brand", "operator": "in", "value": ["a", "b"]},
        ]
    ) == (
        Condition(column="price", operator="ge", value=10),
        Condition(column="brand", operator="in", value=("a", "b")),
    )


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({}, "expected a list of conditions"),
        ([3], "expected such as"),
        ([{"column": "a", "operator": "eq"}], "expected such as"),
        ([{"column": "", "operator": "eq", "value": 1}], "column is ''; name a column"),
        ([{"column": "a", "operator": "like", "value": 1}], "expected one of eq, in, ge"),
        ([{"column": "a", "operator": ["eq"], "value": 1}], "expected one of eq, in, ge"),
        ([{"column": "a", "operator": "in", "value": 1}], "in takes a list"),
        ([{"column": "a", "operator": "in", "value": []}], "in takes a list of at least one"),
        ([{"column": "a", "operator": "eq", "value": [1]}], "eq takes one value"),
        ([{"column": "a", "operator": "eq", "value": None}], "expected a text, a number"),
        ([{"column": "a", "operator": "in", "value": [{}]}], "expected a text, a number"),
        ([{"column": "a", "operator": "eq", "value": math.inf}], "expected a finite number"),
        ([{"column": "a", "operator": "eq", "value": "\ud800"}], "no valid Unicode"),
    ],
)
def test_what_is_no_condition_in_json_is_said(records: Any, message: str):
    with pytest.raises(ValueError, match=message):
        conditions_from_json(records)


def test_kinds_for_those_who_ask():
    kinds = {
        pa.string(): "string",
        pa.int8(): "integer",
        pa.float16(): "number",
        pa.decimal128(5, 2): "number",
        pa.bool_(): "boolean",
        pa.date32(): "time",
        pa.timestamp("s"): "time",
        pa.time32("s"): "other",
        pa.list_(pa.string()): "other",
        pa.binary(): "other",
        pa.null(): "other",
    }
    assert {type_: kind_of(type_) for type_ in kinds} == kinds
