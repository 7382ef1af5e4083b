"""What JSON cannot say, said as null; the rest as it is."""

import json
from dataclasses import dataclass

import pytest

from pipelines.strict_json import strict_json


@dataclass(frozen=True, slots=True)
class Row:
    key: str
    scores: dict[int, float]


def test_numbers_that_json_does_not_have_are_null() -> None:
    rows = [Row("a", {1: 0.5, 5: float("nan")}), Row("b", {1: float("-inf")})]
    text = strict_json({"rows": tuple(rows), "none": None, "count": 3})
    assert json.loads(text) == {
        "rows": [
            {"key": "a", "scores": {"1": 0.5, "5": None}},
            {"key": "b", "scores": {"1": None}},
        ],
        "none": None,
        "count": 3,
    }
    assert "NaN" not in text
    assert "Infinity" not in text


def test_what_has_no_json_is_an_error() -> None:
    for value in (b"bytes", {1}, Row):
        with pytest.raises(TypeError, match="not JSON serializable"):
            strict_json(value)


def test_indented() -> None:
    assert strict_json([1], indent=1) == "[\n 1\n]"
