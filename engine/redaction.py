"""Strips credentials from what is written: messages, logs, reports, manifests.

Knows nothing of who writes, or of what is written besides.

Gone are users, passwords and queries of URIs (a signature is part of a query), what is said of a
token, password or key by name, and the values of environment variables that are named for one.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from numbers import Number
from types import TracebackType
from typing import Any

MASK = "***"
# A shorter value of the environment may be part of any word.
MIN_SECRET_CHARS = 8

# Before an @: all of it where there is a password, which may hold slashes; else the authority.
_USERINFO = re.compile(r"(?<=://)([^/:]*:.*|[^/]*)@")
_QUERY = re.compile(r"[?#].*$", re.DOTALL)
# What stands there before an @ is the container, which is no secret.
_CONTAINER_SCHEMES = re.compile(r"(?:abfss?|wasbs?|az|adl)://[^/:@]*@", re.IGNORECASE)
# A URI amid words ends where they or a quotation do; what closes a sentence is not part of it.
# Its scheme is short: of a long word without any, each letter would be tried as the first of one.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,40}://[^\s\"'<>`]*")
_SENTENCE_END = re.compile(r"[:;,.)\]}]*$")
# Libraries name what they failed on without its scheme: `KEY:SECRET@bucket`.
_BARE_USERINFO = re.compile(r"(?<![^\s\"'<>`:/=(\[{])[^\s\"'<>`:/=(\[{]+:(?!//|:)[^\s\"'<>`]+@")
_SECRET_WORD = (
    r"(?:token|secret|passw(?:or)?d|passphrase|signature|credentials?|(?:api|access|account|secret)"
    r"[_-]?key(?:[_-]?id)?|sharedkey|(?<![\w-])sig)"
)
# From its first letter on: from each of a long word's, it would take a day.
_NAMED = re.compile(rf"(?<![\w-])([\w-]*{_SECRET_WORD})=[^\s\"'&;,]+", re.IGNORECASE)
_QUOTED = re.compile(
    rf"(([\"'])[\w-]*{_SECRET_WORD}\2\s*[:=]\s*)([\"']).*?\3", re.IGNORECASE | re.DOTALL
)
_HEADER = re.compile(
    r"\b(authorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?|bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE
)
_SECRET_OPTION = re.compile(rf"--[\w-]*{_SECRET_WORD}", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?:ACCESS|API|ACCOUNT|PRIVATE|SECRET)_?KEY"
    r"|CONNECTION_STRING)(?:$|_(?!FILE|PATH|URL|URI|ARN|DIR))",
    re.IGNORECASE,
)


def public_uri(uri: str) -> str:
    """A URI (or an option with one) whose user information and query are stars."""
    if "://" not in uri:
        return uri
    if not _CONTAINER_SCHEMES.search(uri):
        uri = _USERINFO.sub(f"{MASK}@", uri)
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
    if "@" in text:
        text = _BARE_USERINFO.sub(f"{MASK}@", text)
    text = _NAMED.sub(rf"\1={MASK}", text)
    text = _QUOTED.sub(rf"\1\3{MASK}\3", text)
    return _HEADER.sub(rf"\1{MASK}", text)


def redact_process() -> None:
    """Keep credentials out of all that this process logs, and out of the traceback it dies with.

    May be called again.
    """
    make_record = logging.getLogRecordFactory()
    if not isinstance(make_record, _RedactedRecords):
        logging.setLogRecordFactory(_RedactedRecords(make_record))
    sys.excepthook = _print_redacted


def _public_match(match: re.Match[str]) -> str:
    uri = match.group()
    end = _SENTENCE_END.search(uri)
    cut = len(uri) if end is None else end.start()
    return public_uri(uri[:cut]) + uri[cut:]


def _environment_secrets() -> list[str]:
    """Values of variables that are named for a secret, the longest first: one may hold another."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_SECRET_CHARS and _SECRET_VARIABLE.search(name)
    }
    return sorted(values, key=len, reverse=True)


class _RedactedRecords:
    """Makes log records as another factory does, without credentials."""

    def __init__(self, make_record: Callable[..., logging.LogRecord]) -> None:
        self._make_record = make_record

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make_record(*args, **kwargs)
        said = str(record.msg)
        record.msg = redacted(said)
        if record.args and record.msg.count("%") != said.count("%"):  # `token=%s`
            record.msg = said
            record.msg, record.args = redacted(record.getMessage()), ()
        elif isinstance(record.args, tuple):  # not put together: some formatters want them apart
            record.args = tuple(map(_redacted_argument, record.args))
        elif record.args:
            record.args = {name: _redacted_argument(part) for name, part in record.args.items()}
        if record.exc_info:
            # Formatters take this where it is there, and do not look at the exception.
            trace = traceback.format_exception(*record.exc_info)
            record.exc_text = redacted("".join(trace).rstrip())
        return record


def _redacted_argument(argument: Any) -> Any:
    """Numbers and the like stay what they are: a format asks for them."""
    return argument if isinstance(argument, Number) else redacted(str(argument))


def _print_redacted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
