"""Tells stores apart: one place has one name, however its URI is written, without secrets in it.

Knows nothing of file systems; imports nothing that a client without datasets has not.
"""

import hashlib
import json
import os
from urllib.parse import quote

from engine.redaction import MASK, public_uri

# Of file systems that go by several names.
_SCHEMES = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs"}
_LOCAL_SCHEMES = ("file", "local")
_LABEL_CHARS = "".join(map(chr, range(0x20, 0x7F)))
_MAX_LABEL_CHARS = 80
_NUM_DIGITS = 8


def store_place(uri: str) -> str:
    """Where a store is: `s3://bucket/products/vectors`, or a path from / on.

    Users, passwords and signatures change, and the store stays. What is beyond a symbolic link, or
    the same server under another name, is not looked at.
    """
    scheme, separator, rest = public_uri(uri).partition("://")
    scheme = scheme.lower()
    if not separator:
        return os.path.abspath(os.path.expanduser(uri))
    rest = rest.removesuffix(f"?{MASK}").removeprefix(f"{MASK}@")
    if scheme in _LOCAL_SCHEMES:
        return os.path.abspath(rest)
    return f"{_SCHEMES.get(scheme, scheme)}://{rest.rstrip('/')}"


def is_read_with(uri: str, folder_uri: str) -> bool:
    """Whether who reads a folder comes to a place: names that begin with _ or . are passed by."""
    place, folder = f"{store_place(uri)}/", f"{store_place(folder_uri).rstrip('/')}/"
    names = place.removeprefix(folder).split("/")
    return place.startswith(folder) and not any(name.startswith(("_", ".")) for name in names)


def absolute_uri(uri: str) -> str:
    """A path of this machine from / on; other URIs as they are."""
    is_path = "://" not in uri and not uri.lower().startswith("file:")
    return os.path.abspath(os.path.expanduser(uri)) if is_path else uri


def store_digest(uri: str) -> str:
    """Of its place, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(["store", store_place(uri)]).encode()).hexdigest()[:16]


def last_parts(uri: str, num_parts: int) -> str:
    """Of a store's place, for people; empty where it has none."""
    place = store_place(uri).rpartition("://")[2].rpartition("@")[2]
    return "/".join([part for part in place.split("/") if part][-num_parts:])


def store_label(uri: str) -> str:
    """A store's name in metrics: the last two parts of its place, and what tells it from others.

    As many as there are stores, each of 80 characters at most: `products/vectors-6c0d3b1f`. They
    are ASCII, as Ray wants labels: letters that are not come as in URLs.
    """
    name = quote(last_parts(uri, 2), safe=_LABEL_CHARS, errors="surrogateescape")
    name = name[-(_MAX_LABEL_CHARS - 1 - _NUM_DIGITS) :]
    return f"{name or 'root'}-{store_digest(uri)[:_NUM_DIGITS]}"
