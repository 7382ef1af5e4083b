"""From where images may be fetched: which schemes, hosts, addresses and folders, in what time.

Knows nothing of how anything is fetched.

A catalog may be written by others than those who run Clipmill. Without more ado its URIs lead to
public hosts by HTTP and HTTPS, and to the object store that the catalog itself is on: not to files
of this machine, and not to what only this network reaches.
"""

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from fsspec.registry import available_protocols

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

HTTP_SCHEMES = frozenset({"http", "https"})
FILE_SCHEMES = frozenset({"file", "local"})
# Whose credentials are the operator's, and whose addresses are of their configuration.
OBJECT_STORES = frozenset(
    {
        *("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl"),
        *("oci", "ocilake", "oss", "tos", "tosfs", "hf"),
    }
)
# Names of one client, which reads the same buckets by any of them.
_ALIASES = {
    "s3a": "s3",
    "gcs": "gs",
    "abfss": "abfs",
    "az": "abfs",
    "ocilake": "oci",
    "tosfs": "tos",
}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HOST = re.compile(r"[a-z0-9*?_-]+(?:\.[a-z0-9*?_-]+)*")
_NUMERIC = re.compile(r"[0-9.*?]+")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Public to `ipaddress`, and yet of the inside: Azure's platform (https://learn.microsoft.com/azure/
# virtual-network/what-is-ip-address-168-63-129-16), protocol assignments, which older Pythons know
# in part (RFC 6890), NAT64 within a network (RFC 8215).
_INSIDE: tuple[Network, ...] = (
    ipaddress.IPv4Network("168.63.129.16/32"),
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv6Network("64:ff9b:1::/48"),
    # Of a site alone, and for documents.
    ipaddress.IPv6Network("fec0::/10"),
    ipaddress.IPv6Network("3fff::/20"),
)


class FetchError(Exception):
    """What a URI led to is no content; the text is for a person."""


class FetchRefusedError(OSError):
    """A URI, or what it leads to, is not among what may be fetched; the text says what would be."""

    def __init__(self, detail: str) -> None:
        """An OSError, since that is what libraries expect of a socket. Its number is none."""
        super().__init__(detail)
        self.detail = detail


class _Allowed(NamedTuple):
    schemes: frozenset[str]
    folders: tuple[str, ...]
    networks: tuple[Network, ...]
    hosts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchPolicy:
    """From where images may be fetched, and in what time."""

    allow: tuple[str, ...] = ()
    """Besides public hosts: hosts (`images.internal`, `*.corp.example`), addresses and networks
    (`10.0.0.0/8`), schemes (`s3:`, `file:`), folders of files (`/data/images`)."""
    hosts: tuple[str, ...] = ()
    """If there are any, no other hosts than these and those of `allow`: `*.acme.com`."""
    max_seconds: float = 30.0
    """For one image, redirects included."""
    max_redirects: int = 5
    """In a row; browsers follow 20, an image rarely needs more than one."""
    catalog_scheme: str | None = None
    """Of the object store that the catalog is on, None if it is on none; see `beside`."""

    def __post_init__(self) -> None:
        """Check the bounds and the spelling."""
        _parsed(self.allow)
        for pattern in self.hosts:
            if not _HOST.fullmatch(_host(pattern)):
                raise ValueError(
                    f"fetch_hosts={pattern!r}: expected the name of a host, or a pattern such as "
                    "*.acme.com"
                )
        if not self.max_seconds > 0:
            raise ValueError(f"max_fetch_seconds={self.max_seconds}: expected more than 0")
        if self.max_redirects < 0:
            raise ValueError(f"max_redirects={self.max_redirects}: expected at least 0")

    def beside(self, catalog_uri: str) -> "FetchPolicy":
        """The same for the images of a catalog, whose own object store is allowed too."""
        scheme = scheme_of(catalog_uri)
        return replace(self, catalog_scheme=scheme if scheme in OBJECT_STORES else None)

    def check_scheme(self, scheme: str) -> None:
        """Raise FetchRefusedError for a scheme that is not allowed; of files, paths decide."""
        if scheme in HTTP_SCHEMES:
            return
        allowed = _parsed(self.allow).schemes
        if self.catalog_scheme is not None:
            allowed |= {self.catalog_scheme}
        if _store_of(scheme) not in map(_store_of, allowed):
            raise FetchRefusedError(
                f"{scheme}: is not allowed; name it with --fetch-allow {scheme}:"
            )

    def check_host(self, host: str) -> None:
        """Raise FetchRefusedError for a host that is not among those named, where some are."""
        host = _host(host)
        if self.hosts and not _is_any(host, (*self.hosts, *_parsed(self.allow).hosts)):
            raise FetchRefusedError(f"host {host} is not among --fetch-hosts")

    def trusts(self, host: str) -> bool:
        """Whether a host was named, so that it may be at any address."""
        return _is_any(_host(host), _parsed(self.allow).hosts)

    def check_address(self, address: str) -> None:
        """Raise FetchRefusedError for an address that is neither public nor allowed."""
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            raise FetchRefusedError(f"{address!r} is no address in its usual form") from None
        forms = [found, *_embedded(found)]
        networks = _parsed(self.allow).networks
        if any(form in network for form in forms for network in networks):
            return
        for form in forms:
            if not _is_public(form):
                raise FetchRefusedError(
                    f"{address} is no public address; if it is meant, name its host or network "
                    "with --fetch-allow"
                )

    def check_path(self, path: str) -> None:
        """Raise FetchRefusedError for a file that is not allowed; its links must be resolved."""
        allowed = _parsed(self.allow)
        if allowed.schemes & FILE_SCHEMES:
            return
        folders = map(os.path.realpath, allowed.folders)
        if not any(os.path.commonpath([path, folder]) == folder for folder in folders):
            raise FetchRefusedError(
                f"{path}: files are not allowed; name their folder with --fetch-allow /FOLDER"
            )


def scheme_of(uri: str) -> str:
    """In small letters; `file` where there is none. Of chained URIs, the first one's."""
    found = _SCHEME.match(uri)
    return found[1].lower() if found else "file"


def _store_of(scheme: str) -> str:
    """One name for all that a store is called by."""
    return _ALIASES.get(scheme, scheme)


@cache
def _parsed(words: tuple[str, ...]) -> _Allowed:
    schemes: set[str] = set()
    folders: list[str] = []
    networks: list[Network] = []
    hosts: list[str] = []
    for word in words:
        host = _host(word)
        if _SCHEME.fullmatch(word):
            schemes.add(_known_scheme(word))
        elif word.startswith(("/", "file:///")):
            folders.append(word.removeprefix("file://"))
        elif (network := _network(word)) is not None:
            networks.append(network)
        elif _HOST.fullmatch(host) and not _NUMERIC.fullmatch(host):
            hosts.append(host)
        else:
            raise ValueError(
                f"fetch_allow={word!r}: expected a host (images.internal, *.corp.example), an "
                "address or a network (10.0.0.0/8), a scheme with its colon (s3:) or a folder in "
                "full (/data/images)"
            )
    return _Allowed(frozenset(schemes), tuple(folders), tuple(networks), tuple(hosts))


def _known_scheme(word: str) -> str:
    scheme = word[:-1].lower()
    if scheme not in available_protocols() and scheme not in OBJECT_STORES:
        raise ValueError(
            f"fetch_allow={word!r}: no such scheme; expected one that fsspec knows, such as s3:"
        )
    return scheme


def _network(word: str) -> Network | None:
    """None for what is none; ValueError for one with bits behind its mask."""
    plain = word.removeprefix("[").removesuffix("]")
    looks_so = "/" in plain or ":" in plain or _NUMERIC.fullmatch(plain)
    if "://" in plain or not looks_so:
        return None
    try:
        return ipaddress.ip_network(plain)
    except ValueError as error:
        raise ValueError(
            f"fetch_allow={word!r}: {error}; expected a network such as 10.0.0.0/8"
        ) from error


def _host(name: str) -> str:
    """As names of hosts are compared."""
    return name.lower().rstrip(".")


def _is_any(host: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(host, _host(pattern)) for pattern in patterns)


def _embedded(address: Address) -> list[Address]:
    """IPv4 addresses that an IPv6 address leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [form for form in found if form is not None]


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped or address in _NAT64):
        return True  # which of them is decided by what it leads to
    is_special = address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not is_special and not any(address in part for part in _INSIDE)
