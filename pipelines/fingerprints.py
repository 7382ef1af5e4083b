"""Fingerprints: 128-bit hashes of what a row's embedding depends on.

Knows nothing of where rows come from. The hash is XXH3-128: fast, of even quality, and not
meant to withstand an author who wants two rows to collide.
"""

from collections.abc import Iterable, Sequence

import pyarrow as pa
import xxhash

from pipelines import schema
from pipelines.binary_columns import binary_views
from pipelines.schema import FINGERPRINT_TYPE, Modality


def row_fingerprints(table: pa.Table, *, modality: Modality) -> pa.Array:
    """Fingerprints binary(16) of one modality of canonical rows; null where there is no content.

    With a version column they hash the key and the version; otherwise the image's bytes (its URI
    where it has to be fetched) or the text.
    """
    if schema.VERSION in table.column_names:
        keys, versions = table[schema.KEY].to_pylist(), table[schema.VERSION].to_pylist()
        return _hashes(
            # A null is no version, and not the word None.
            (f"{modality}\0{key}" if version is None else f"{modality}\0{key}\0{version}").encode()
            for key, version in zip(keys, versions, strict=True)
        )
    if modality == "text":
        return _hashes(table[schema.TEXT].to_pylist())
    return _hashes(
        _uri_content(uri) if image is None else image
        for image, uri in zip(
            binary_views(table[schema.IMAGE]), table[schema.IMAGE_URI].to_pylist(), strict=True
        )
    )


def plan_id(parts: Sequence[str]) -> str:
    """A name (16 hex digits) for the work that these strings describe."""
    return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())


def index_id(parts: Sequence[str]) -> str:
    """A name (32 hex digits) for the index that these strings describe."""
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def _uri_content(uri: bytes | None) -> bytes | None:
    return None if uri is None else b"uri\0" + uri


def _hashes(contents: Iterable[bytes | memoryview | None]) -> pa.Array:
    return pa.array(
        [None if content is None else xxhash.xxh3_128_digest(content) for content in contents],
        FINGERPRINT_TYPE,
    )
