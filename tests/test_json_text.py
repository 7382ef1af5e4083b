"""Results become JSON that any parser reads."""

import json
import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest

from pipelines.json_text import json_text, json_value


@dataclass(frozen=True)
class Inner:
    value: float


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    by_cutoff: dict[int, float]
    name: str | None = None
    num_parts: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_parts", len(self.parts))


def strict(text: str) -> object:
    """Parsed by a reader that refuses what RFC 8259 does not have."""

    def refuse(constant: str) -> object:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_dataclasses_are_objects_with_all_their_fields() -> None:
    result = Outer(parts=(Inner(0.5), Inner(2.0)), by_cutoff={10: 1.0})
    assert strict(json_text(result)) == {
        "parts": [{"value": 0.5}, {"value": 2.0}],
        "by_cutoff": {"10": 1.0},
        "name": None,
        "num_parts": 2,
    }
    assert json_text([result], indent=1).startswith('[\n {\n  "parts": [')


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_null(number: float) -> None:
    result = Outer(parts=(Inner(number),), by_cutoff={1: number})
    read = strict(json_text({"all": [result, number]}))
    assert read == {
        "all": [
            {"parts": [{"value": None}], "by_cutoff": {"1": None}, "name": None, "num_parts": 1},
            None,
        ]
    }


def test_what_has_no_json_form_is_a_bug() -> None:
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        json_text({"names": {"a"}})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (2**63, 2**63),
        ("é", "é"),
        (0.5, 0.5),
        (math.nan, None),
        (Decimal("1.20"), 1.2),
        (datetime(2026, 3, 1, 12, tzinfo=UTC), "2026-03-01T12:00:00+00:00"),
        (date(2026, 3, 1), "2026-03-01"),
        (time(12, 30), "12:30:00"),
        (timedelta(days=1), "1 day, 0:00:00"),
        (b"\xff", "/w=="),
        ({"a": [Decimal(1), b""], 2: (None, math.inf)}, {"a": [1.0, ""], "2": [None, None]}),
    ],
)
def test_values_of_columns_become_ones_that_json_has(value: Any, expected: Any) -> None:
    assert json_value(value) == expected
    assert strict(json_text(json_value(value))) == expected
