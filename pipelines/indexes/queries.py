"""What a query is: texts, images, keys and vectors, each with a weight, to be near to or far from.

Knows nothing of how they become vectors.
"""

import base64
import binascii
import math
from dataclasses import dataclass
from typing import Any

from pipelines.errors import QueryError
from pipelines.indexes.filters import Condition, conditions_from_json
from pipelines.indexes.shown import shown

CONTENTS = ("text", "image", "key", "vector")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Something that hits are to be near to, or far from; one of text, image, key and vector."""

    text: str | None = None
    """Words; beyond the engine's token length they are cut."""
    image: bytes | None = None
    """An encoded picture."""
    key: str | int | None = None
    """A row of the store: its embedding."""
    vector: tuple[float, ...] | None = None
    """D numbers of any norm but 0, of the same engine."""
    weight: float = 1.0
    """Of the part's unit vector in the sum; negative: away from it."""

    def __post_init__(self) -> None:
        """Check what needs no look at the store."""
        given = [name for name in CONTENTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise QueryError(
                f"a part of a query has {' and '.join(given) or 'nothing to look for'}; give it "
                f"exactly one of {', '.join(CONTENTS)}"
            )
        if not _is_number(self.weight) or not _is_finite(self.weight) or self.weight == 0:
            raise QueryError(
                f"weight={shown(self.weight)}: expected a finite number but 0 (below 0: away "
                "from it)"
            )
        if self.text is not None:
            _check_text(self.text)
        if self.image is not None and not isinstance(self.image, bytes):
            raise QueryError(f"a query's image is of {type(self.image).__name__}; expected bytes")
        if self.key is not None and (
            not isinstance(self.key, str | int) or isinstance(self.key, bool)
        ):
            raise QueryError(f"key={shown(self.key)}: expected text or an integer")
        if self.vector is not None:
            _check_vector(self.vector)


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What to look for: the direction of the weighted sum of its parts' unit vectors."""

    parts: tuple[Part, ...]
    """At least one of them with a positive weight."""

    def __post_init__(self) -> None:
        """Check that it says what to be near to."""
        if not any(part.weight > 0 for part in self.parts):
            what = "only what to be far from" if self.parts else "no parts"
            raise QueryError(f"a query has {what}; say what to be near to as well")


def query_from_json(record: object) -> tuple[Query, tuple[Condition, ...]]:
    """A query and its conditions from JSON.

    {"parts": [{"text": "red shoe"}, {"key": "k7", "weight": -0.5}], "where": [...]}: of a part,
    `image` is in base64, and `weight` may be missing; `where` may be missing, and is as for
    `conditions_from_json`.

    Raises:
        ValueError: It is something else, or what cannot be asked.
    """
    if not isinstance(record, dict) or not {"parts"} <= record.keys() <= {"parts", "where"}:
        raise QueryError(
            f'a query is {shown(record)}; expected such as {{"parts": [{{"text": "red shoe"}}]}}, '
            'and "where" with conditions if there are any'
        )
    if not isinstance(record["parts"], list):
        raise QueryError(f"a query's parts are {shown(record['parts'])}; expected a list")
    parts = tuple(part_from_json(part) for part in record["parts"])
    return Query(parts=parts), conditions_from_json(record.get("where", []))


def part_from_json(record: object) -> Part:
    """A part of a query from JSON; ValueError for what is none."""
    if not isinstance(record, dict) or not record.keys() <= {*CONTENTS, "weight"}:
        raise QueryError(
            f"a part of a query is {shown(record)}; expected such as "
            f'{{"text": "red shoe", "weight": 0.5}}, with one of {", ".join(CONTENTS)}'
        )
    vector = record.get("vector")
    if vector is not None and not isinstance(vector, list):
        raise QueryError(f"a query's vector is {shown(vector)}; expected a list of numbers")
    return Part(
        text=record.get("text"),
        image=_image_from_json(record.get("image")),
        key=record.get("key"),
        vector=None if vector is None else tuple(vector),
        weight=record.get("weight", 1.0),
    )


def _image_from_json(text: Any) -> bytes | None:
    if text is None:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise QueryError(
            f"a query's image is no base64 ({error}); give the file's bytes in base64, without "
            "`data:...,` before them"
        ) from error


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise QueryError(f"a query's text is {shown(text)}; expected a string")
    if not text.strip():
        raise QueryError("query text is empty; write what to look for")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"query text {shown(text)} is no valid Unicode ({error})") from error


def _check_vector(vector: object) -> None:
    if not isinstance(vector, tuple) or not all(map(_is_number, vector)):
        raise QueryError(f"a query's vector is {shown(vector)}; expected numbers")
    if not all(map(_is_finite, vector)):
        raise QueryError("a query's vector holds values that are not finite")
    if not any(vector):
        raise QueryError("a query's vector is zero and has no direction; give another")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False
