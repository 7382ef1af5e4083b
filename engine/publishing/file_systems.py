"""Finds the file system of a URI, and names what file systems raise.

Knows nothing of what lies there.
"""

import sys
from typing import Any

import aiohttp
import fsspec


def open_file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the path within it.

    It remembers no listings: other processes add and replace files.

    Raises:
        ValueError: No such kind of file system.
        ImportError: The package that reads it is missing.
    """
    fs, path = fsspec.url_to_fs(uri, use_listings_cache=False)
    return fs, str(path)


def open_parts(fs: Any, path: str) -> Any:
    """Open a file of which some parts are read: no more than these is asked for.

    fsspec would read on from each, on S3 for 50 MiB.
    """
    return fs.open(path, "rb", cache_type="none")


def file_system_errors() -> tuple[type[Exception], ...]:
    """What a file system raises where the place is missing, closed to us or out of reach."""
    # s3fs passes on botocore's own errors (no credentials, no connection), which are no OSErrors.
    # Where nothing has imported botocore, nothing raises them.
    botocore: Any = sys.modules.get("botocore.exceptions")
    return (OSError, aiohttp.ClientError, *([botocore.BotoCoreError] if botocore else []))


def is_write_conflict(error: OSError) -> bool:
    """Whether an object store refused a write because another one is under way, and asks again.

    S3 answers 409 ConditionalRequestConflict to some of those who create an object at once:
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
    """
    response = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "ConditionalRequestConflict")
