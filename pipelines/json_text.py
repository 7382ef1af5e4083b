"""Results as JSON: dataclasses as objects, null for what is not finite, dates in ISO 8601.

Knows nothing of what the results are of.
"""

import base64
import dataclasses
import json
import math
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any


def json_text(result: Any, *, indent: int | None = None) -> str:
    """A dataclass, or anything of mappings, sequences and them, as JSON (RFC 8259).

    Raises:
        TypeError: A value in it has no JSON form.
    """
    return json.dumps(_plain(result), indent=indent, allow_nan=False)


def json_value(value: Any) -> Any:
    """A value of a table's column, as Arrow gives it, as one that JSON has.

    Dates and times in ISO 8601, bytes in base64, decimals as numbers, other kinds as their text.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return str(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {part.name: _plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
