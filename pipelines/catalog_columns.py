"""Checks the columns of a catalog's files: that they are there, and of types that can be read.

Knows nothing of files but their schemas.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any

import pyarrow as pa

from pipelines.errors import CatalogError


class ImageLayout(StrEnum):
    """How a catalog holds its images."""

    BYTES = "bytes"
    STRUCT = "struct"
    URI = "uri"


class SchemaCheck:
    """Collects the faults of all columns in all files."""

    def __init__(self, schemas: dict[str, pa.Schema]) -> None:
        """Begin without faults; `schemas` are by path."""
        self._schemas = schemas
        self._faults: list[str] = []

    def fault(self, text: str) -> None:
        """Note a fault."""
        self._faults.append(text)

    def column(
        self, role: str, name: str, normalize: Callable[[pa.DataType], Any], expected: str
    ) -> Any:
        """The normalized type of a column, or None with a fault noted."""
        missing: list[str] = []
        repeated: list[str] = []
        wrong: dict[pa.DataType, list[str]] = defaultdict(list)
        kinds: dict[Any, list[str]] = defaultdict(list)
        for path, columns in self._schemas.items():
            if name not in columns.names:
                missing.append(path)
                continue
            if columns.names.count(name) > 1:
                repeated.append(path)
                continue
            type_ = columns.field(name).type
            normalized = normalize(type_)
            (wrong[type_] if normalized is None else kinds[normalized]).append(path)
        if missing:
            self.fault(f"{role} column {name!r} is missing in {_some(missing)}")
        if repeated:
            self.fault(f"{role} column {name!r} is there more than once in {_some(repeated)}")
        for type_, paths in wrong.items():
            self.fault(f"{role} column {name!r} must be {expected}, is {type_} in {_some(paths)}")
        if len(kinds) > 1:
            each = ", ".join(f"{kind} in {_some(paths)}" for kind, paths in kinds.items())
            self.fault(f"{role} column {name!r} differs between files: {each}")
        return next(iter(kinds), None)

    def finish(self, uri: str) -> None:
        """Raise CatalogError with all faults, if there are any."""
        if not self._faults:
            return
        columns = sorted(
            {f"{field.name} ({field.type})" for names in self._schemas.values() for field in names}
        )
        faults = "".join(f"\n  - {fault}" for fault in self._faults)
        raise CatalogError(f"catalog {uri}:{faults}\ncolumns there: {', '.join(columns)}")


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 1} more files" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"


def _plain(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _is_any(type_: pa.DataType, checks: Iterable[Callable[[pa.DataType], bool]]) -> bool:
    return any(check(type_) for check in checks)


_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARIES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


def key_type(type_: pa.DataType) -> pa.DataType | None:
    """As which type keys are read, None if they cannot be."""
    type_ = _plain(type_)
    if _is_any(type_, _STRINGS):
        return pa.string()
    # Larger than int64 holds; such keys are better strings.
    return pa.int64() if pa.types.is_integer(type_) and type_ != pa.uint64() else None


def text_type(type_: pa.DataType) -> pa.DataType | None:
    """String, None for what is none."""
    return pa.string() if _is_any(_plain(type_), _STRINGS) else None


def image_layout(type_: pa.DataType) -> ImageLayout | None:
    """How a column of this type holds images, None if it cannot."""
    if pa.types.is_struct(type_):
        fields = {field.name: field.type for field in type_}
        has_bytes = "bytes" in fields and _is_any(fields["bytes"], _BINARIES)
        return ImageLayout.STRUCT if has_bytes else None
    type_ = _plain(type_)
    if _is_any(type_, _BINARIES):
        return ImageLayout.BYTES
    return ImageLayout.URI if _is_any(type_, _STRINGS) else None


def version_kind(type_: pa.DataType) -> str | None:
    """What versions are, None if they cannot be: of one kind, equal ones have equal texts."""
    type_ = _plain(type_)
    if _is_any(type_, _STRINGS):
        return "string"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "number"
    if pa.types.is_timestamp(type_):
        return "timestamp"
    return str(type_) if pa.types.is_temporal(type_) else None


def any_type(type_: pa.DataType) -> pa.DataType:
    """The type itself."""
    return type_
