"""Strips credentials from what is written: messages, logs, reports, manifests.

Knows nothing of who writes, or of what is written besides.

Gone are users, passwords and queries of URIs (a signature is part of a query), what is said of a
token, password or key by name, and the values of environment variables that are named for one.
"""

import os
import re
from collections.abc import Sequence

from engine.named_secrets import NAME, without_named

MASK = "***"
# A shorter value of the environment may be part of any word.
MIN_SECRET_CHARS = 8

# Without a user, whether with a port or not: an @ behind it is part of a path.
_HOST = r"(?:\[[\da-fA-F:.]*\]|[^/:@]*)(?::\d{1,5})?/"
# Before an @: all of it where there is a password, which may hold slashes; else the authority. Of
# s3 there are no ports, and some of its secrets begin with a digit and a slash.
_USERINFO = re.compile(
    rf"(?<=://)(?:(?<=s3://)|(?<=s3[an]://)|(?!{_HOST}))(?:[^/:]*:.*|[^/]*)@",
    re.IGNORECASE | re.DOTALL,
)
_QUERY = re.compile(r"[?#].*$", re.DOTALL)
# What stands there before an @ is the container, which is no secret.
_CONTAINER_SCHEMES = re.compile(r"(?:abfss?|wasbs?|az|adl)://[^/:@]*@", re.IGNORECASE)
# A URI amid words ends where they or a quotation do; what closes a sentence is not part of it.
# Its scheme is short: of a long word without any, each letter would be tried as the first of one.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,40}://(?:[^\s\"'<>`]|[\"'](?=\w))*")
_SENTENCE_END = ":;,.)]}"
# What was written without a blank.
_WORD = re.compile(r"[^\s\"'<>`]+")
# Libraries name what they failed on without its scheme: `KEY:SECRET@bucket`.
_BARE_USERINFO = re.compile(
    rf"(?P<host>://{_HOST})"
    r"|(?<![^\s\"'<>`:/=(\[{])[^\s\"'<>`:/=(\[{]+:(?!//|:)[^\s\"'<>`]+@"
)
_SECRET_OPTION = re.compile(rf"--[\w-]*{NAME}", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?:ACCESS|API|ACCOUNT|PRIVATE|SECRET)_?KEY"
    r"|CONNECTION_STRING)(?:$|_(?!FILE|PATH|URL|URI|ARN|DIR))",
    re.IGNORECASE,
)


def public_uri(uri: str) -> str:
    """A URI (or an option with one) whose user information and query are stars."""
    if "://" not in uri:
        return uri
    if not _CONTAINER_SCHEMES.search(uri):
        # Of what has no @ behind it, each part would be looked at from there to the end.
        end = uri.rfind("@") + 1
        uri = _USERINFO.sub(f"{MASK}@", uri[:end]) + uri[end:]
    return _QUERY.sub(f"?{MASK}", uri)


def without_secrets(words: Sequence[str]) -> tuple[str, ...]:
    """Words of a command line without what URIs and options hold of users, passwords, tokens."""
    public = []
    is_secret = False
    for word in words:
        public.append(MASK if is_secret else redacted(public_uri(word)))
        is_secret = not is_secret and _SECRET_OPTION.fullmatch(word) is not None
    return tuple(public)


def redacted(text: str) -> str:
    """A text for people without what it holds of credentials, as far as they can be told."""
    for value in _environment_secrets():
        text = text.replace(value, MASK)
    if "://" in text:
        text = _URI.sub(_public_match, text)
    text = without_named(text, mask=MASK)
    return _WORD.sub(_without_userinfo, text) if "@" in text else text


def _public_match(match: re.Match[str]) -> str:
    uri = match.group().rstrip(_SENTENCE_END)
    return public_uri(uri) + match.group()[len(uri) :]


def _without_userinfo(match: re.Match[str]) -> str:
    word = match.group()
    end = word.rfind("@") + 1  # as in `public_uri`
    public = _BARE_USERINFO.sub(lambda found: found["host"] or f"{MASK}@", word[:end])
    return public + word[end:]


def _environment_secrets() -> list[str]:
    """Values of variables that are named for a secret, the longest first: one may hold another."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_SECRET_CHARS and _SECRET_VARIABLE.search(name)
    }
    return sorted(values, key=len, reverse=True)
