"""Results become JSON that any parser reads."""

import json
import math
from dataclasses import dataclass, field

import pytest

from pipelines.json_text import json_text


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
