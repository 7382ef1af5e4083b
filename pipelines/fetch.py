"""Fetches images that a catalog names by URI.

Knows nothing of images; a fetch that fails is a value, not an error of the run.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import aiohttp
import fsspec

FETCH_THREADS = 16  # a fetch waits for the network nearly all its time
FETCH_TIMEOUT_SECONDS = 30
_HTTP_OPTIONS = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=FETCH_TIMEOUT_SECONDS)}}
# Without a block size fsspec streams; with any size it does not ask the server for one first.
_HTTP_OPEN_OPTIONS = {"block_size": 0, "size": 1}


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """Why a URI gave no content."""

    detail: str
    """For a person, one line."""


def fetch_all(uris: Sequence[bytes], *, max_bytes: int) -> list[bytes | FetchFailure]:
    """Fetch several URIs at once, in their order.

    Args:
        uris: Any that fsspec reads (https:, s3:, gs:, file: ...). UTF-8, unchecked.
        max_bytes: Reading stops one byte beyond; the caller sees that it is too large.
    """
    with ThreadPoolExecutor(min(FETCH_THREADS, max(1, len(uris)))) as threads:
        return list(threads.map(lambda uri: _fetch(uri, max_bytes=max_bytes), uris))


def _fetch(encoded: bytes, *, max_bytes: int) -> bytes | FetchFailure:
    try:
        uri = encoded.decode()
    except UnicodeDecodeError as error:
        return FetchFailure(f"URI is not UTF-8: {error.reason} at {error.start}")
    is_http = uri.startswith(("http:", "https:"))
    options: dict[str, Any] = _HTTP_OPTIONS if is_http else {}
    try:
        fs, path = fsspec.url_to_fs(uri, **options)
        with fs.open(path, "rb", **(_HTTP_OPEN_OPTIONS if is_http else {})) as file:
            return _read(file, max_bytes=max_bytes)
    # A URI can lead to any of fsspec's file systems, each with exceptions of its own, and one bad
    # row never stops a run.
    except Exception as error:  # noqa: BLE001
        return FetchFailure(f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _read(file: Any, *, max_bytes: int) -> bytes:
    """Read to the end, or one byte beyond the bound: a stream gives what has arrived so far."""
    content = bytearray()
    while len(content) <= max_bytes:
        chunk = file.read(max_bytes + 1 - len(content))
        if not chunk:
            break
        content += chunk
    return bytes(content)
