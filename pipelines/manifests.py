"""Reads manifests: JSON of a format and with fields that this Clipmill knows, into dataclasses.

Knows nothing of what they describe.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from pipelines.errors import StoreError
from pipelines.store import Store

T = TypeVar("T")


class UnknownFieldError(TypeError):
    """A record has a field that its dataclass does not have; the message is its name."""


def from_record(kind: type[T], record: Mapping[str, Any]) -> T:
    """A dataclass of what a JSON object holds.

    Raises:
        UnknownFieldError: It holds more.
        TypeError, AttributeError: It holds less, or is no object.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name in record.keys() - known:
        raise UnknownFieldError(name)
    return kind(**record)


def read_manifest(
    store: Store,
    path: str,
    *,
    format_version: int,
    build: Callable[[dict[str, Any]], T],
    way_out: str,
) -> T:
    """Read a manifest.

    Args:
        store: Where it is.
        path: Relative to the store's root.
        format_version: The highest that is known.
        build: Makes of its fields what it describes; raises as `from_record`, or KeyError.
        way_out: What to do about a damaged one.

    Raises:
        StoreError: It cannot be read, is damaged, or was written by a newer Clipmill.
    """
    with manifest_errors(store, path, way_out=way_out):
        record: dict[str, Any] = json.loads(store.read(path))
        version = record.pop("format_version")
        if version > format_version:
            raise StoreError(
                f"store {store.uri}: {path} is of format {version}, this Clipmill reads "
                f"{format_version}; upgrade Clipmill"
            )
        return build(record)


@contextmanager
def manifest_errors(store: Store, path: str, *, way_out: str) -> Iterator[None]:
    """Raise StoreError for what a block finds in a file's JSON that it cannot be."""
    try:
        yield
    except UnknownFieldError as error:
        raise StoreError(
            f"store {store.uri}: {path} was written by a newer Clipmill, this one does not know "
            f"its field {str(error)!r}; upgrade Clipmill, on all nodes"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"store {store.uri}: {path} is damaged ({error}); {way_out}") from error
