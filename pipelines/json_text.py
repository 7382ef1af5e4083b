"""Results as JSON: dataclasses as objects, null for numbers that JSON does not have.

Knows nothing of what the results are of.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(result: Any, *, indent: int | None = None) -> str:
    """A dataclass, or anything of mappings, sequences and them, as JSON (RFC 8259).

    Raises:
        TypeError: A value in it has no JSON form.
    """
    return json.dumps(_plain(result), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {part.name: _plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
