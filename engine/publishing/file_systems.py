"""Finds the file system of a URI, and names what file systems raise.

Knows nothing of what lies there.
"""

import base64
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem


def open_file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the path within it.

    It remembers no listings: other processes add and replace files. User and password of an HTTP
    URI go into the file system: the path, and those of files below, are recorded and shown.

    Raises:
        ValueError: No such kind of file system.
        ImportError: The package that reads it is missing.
    """
    uri, options = _without_userinfo(uri)
    fs, path = fsspec.url_to_fs(uri, use_listings_cache=False, **options)
    return fs, str(path)


def _without_userinfo(uri: str) -> tuple[str, dict[str, Any]]:
    """An HTTP URI without its user and password, and the option that says them to fsspec."""
    if not uri.startswith(("http://", "https://")):
        return uri, {}
    parts = urlsplit(uri)
    userinfo, at, authority = parts.netloc.rpartition("@")
    if not at:
        return uri, {}
    user, _, password = userinfo.partition(":")
    pair = f"{unquote(user)}:{unquote(password)}"
    headers = {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}  # RFC 7617
    bare = urlunsplit(parts._replace(netloc=authority))
    return bare, {"client_kwargs": {"headers": headers}}


def open_parts(fs: Any, path: str) -> Any:
    """Open a file of which some parts are read: no more than these is asked for.

    fsspec would read on from each, on S3 for 50 MiB.
    """
    return fs.open(path, "rb", cache_type="none")


def find_files(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """Path -> description of all in a folder and in those within; of a file, itself.

    Empty if there is no such folder. What the file system raises is raised: of folders that a disk
    does not let us list, fsspec's own `find` makes empty ones.
    """
    if isinstance(fs, LocalFileSystem):
        return {info["name"]: info for info in _walk(fs, path)}
    found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    return found


def _walk(fs: LocalFileSystem, path: str) -> Iterator[dict[str, Any]]:
    try:
        infos = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):  # also: gone meanwhile
        return
    for info in infos:
        if info["type"] == "directory":
            yield from _walk(fs, info["name"])
        else:
            yield info


def file_system_errors() -> tuple[type[Exception], ...]:
    """What a file system raises where the place is missing, closed to us or out of reach."""
    # Object stores and HTTP pass on errors of their libraries (no credentials, no connection, an
    # answer that cannot be parsed), which are no OSErrors. What nothing has imported raises none.
    names = {
        "aiohttp": "ClientError",
        "botocore.exceptions": "BotoCoreError",
        "botocore.parsers": "ResponseParserError",
    }
    of_libraries = [
        getattr(sys.modules[module], name)
        for module, name in names.items()
        if module in sys.modules
    ]
    return (OSError, *of_libraries)


def is_write_conflict(error: OSError) -> bool:
    """Whether an object store refused a write because another one is under way, and asks again.

    S3 answers 409 ConditionalRequestConflict to some of those who create an object at once:
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
    """
    response = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "ConditionalRequestConflict")
