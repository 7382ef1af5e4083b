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


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """Why a URI gave no content."""

    detail: str
    """For a person, one line."""


def fetch_all(uris: Sequence[str], *, max_bytes: int) -> list[bytes | FetchFailure]:
    """Fetch several URIs at once, in their order.

    Args:
        uris: Any that fsspec reads (https:, s3:, gs:, file: ...).
        max_bytes: Reading stops one byte beyond; the caller sees that it is too large.
    """
    with ThreadPoolExecutor(min(FETCH_THREADS, max(1, len(uris)))) as threads:
        return list(threads.map(lambda uri: _fetch(uri, max_bytes=max_bytes), uris))


def _fetch(uri: str, *, max_bytes: int) -> bytes | FetchFailure:
    options: dict[str, Any] = _HTTP_OPTIONS if uri.startswith(("http:", "https:")) else {}
    try:
        with fsspec.open(uri, "rb", block_size=0 if options else None, **options) as file:
            content: bytes = file.read(max_bytes + 1)
    except (OSError, ValueError, ImportError, TimeoutError, aiohttp.ClientError) as error:
        return FetchFailure(f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return content
