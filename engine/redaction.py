"""Strips credentials from what is written: messages, logs, reports, manifests.

Knows nothing of who writes, or of what is written besides.

Gone are users, passwords and queries of URIs (a signature is part of a query), what is said of a
token, password or key by name, and the values of environment variables that are named for one.
"""

import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from numbers import Number
from types import TracebackType
from typing import Any

from engine.spoken_secrets import NAME, without_spoken

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
# What was written without a blank.
_WORD = re.compile(r"[^\s\"'<>`]+")
# Libraries name what they failed on without its scheme: `KEY:SECRET@bucket`.
_BARE_USERINFO = re.compile(r"(?<![^\s\"'<>`:/=(\[{])[^\s\"'<>`:/=(\[{]+:(?!//|:)[^\s\"'<>`]+@")
_SECRET_WORD = (
    r"(?:token|secret|passw(?:or)?d|passphrase|signature|credentials?|(?:api|access|account|secret)"
    r"[_-]?key(?:[_-]?id)?|sharedkey|(?<![\w-])sig)"
)
# From its first letter on: from each of a long word's, it would take a day.
_NAMED = re.compile(
    rf"(?<![\w-])([\w-]*{_SECRET_WORD})=(?![bru]{{0,2}}\\{{0,3}}[\"'])[^\s\"'&;,]+", re.IGNORECASE
)
# The value in quotes, the name too or not; within JSON in JSON, backslashes stand before them.
_QUOTED = re.compile(
    rf"((?:(\\{{0,3}}[\"'])|(?<![\w-]))[\w-]*{_SECRET_WORD}(?(2)\2)\s{{0,3}}[:=]\s{{0,3}}[bru]{{0,2}})"
    r"(\\{0,3}[\"']).*?\3",
    re.IGNORECASE | re.DOTALL,
)
_HEADER = re.compile(
    r"\b(authorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?|bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE
)
# A value that comes apart from its name, which says what it is.
_FORMATTED = re.compile(
    rf"(?:{_SECRET_WORD}|{NAME})[\"']?\s{{0,3}}[:=]\s{{0,3}}[\"']?%", re.IGNORECASE
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
    text = _QUOTED.sub(rf"\1\3{MASK}\3", text)
    text = _NAMED.sub(rf"\1={MASK}", text)
    text = without_spoken(text, mask=MASK)
    if "@" in text:
        text = _WORD.sub(_without_userinfo, text)
    return _HEADER.sub(rf"\1{MASK}", text)


def redact_process() -> None:
    """Keep credentials out of what this process logs, warns of, and writes of errors on stderr.

    May be called again. Hooks for errors of threads, and of what nobody waits for, stay those of
    others where there are any.
    """
    make_record = logging.getLogRecordFactory()
    if not isinstance(make_record, _RedactedRecords):
        logging.setLogRecordFactory(_RedactedRecords(make_record))
    sys.excepthook = _print_redacted
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _print_of_thread
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unraisable
    if not isinstance(warnings.formatwarning, _RedactedWarnings):
        warnings.formatwarning = _RedactedWarnings(warnings.formatwarning)


def _public_match(match: re.Match[str]) -> str:
    uri = match.group()
    end = _SENTENCE_END.search(uri)
    cut = len(uri) if end is None else end.start()
    return public_uri(uri[:cut]) + uri[cut:]


def _without_userinfo(match: re.Match[str]) -> str:
    # Of what has no @ behind it, each part would be looked at from there to the end.
    word = match.group()
    end = word.rfind("@") + 1
    return _BARE_USERINFO.sub(f"{MASK}@", word[:end]) + word[end:]


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
        is_cut = record.msg.count("%") != said.count("%")  # `token=%s`
        if record.args and (is_cut or _FORMATTED.search(said)):
            record.msg = said
            try:
                said = record.getMessage()
            except (TypeError, ValueError, KeyError):  # which logging itself only tells of
                said = f"{said} {record.args}"
            record.msg, record.args = redacted(said), ()
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


def _print_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread is not None else threading.get_ident()
    trace = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
    sys.stderr.write(redacted(f"Exception in thread {name}:\n{''.join(trace)}"))


def _print_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    # Without its `repr`, which may be any code of an object that is half gone.
    thing = unraisable.object
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    trace = traceback.format_exception(
        unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback
    )
    what = unraisable.err_msg or "Exception ignored in"
    sys.stderr.write(redacted(f"{what}: {name}\n{''.join(trace)}"))


class _RedactedWarnings:
    """Formats warnings as another function does, without credentials."""

    def __init__(self, format_warning: Callable[..., str]) -> None:
        self._format_warning = format_warning

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        return redacted(self._format_warning(message, category, filename, lineno, line))
