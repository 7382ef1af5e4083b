"""Strips secrets that stand after their names: `password: x`, `token=x`, `"api_key": "x"`.

Knows nothing of URIs. What is in quotes, after `=` without a blank, or after the scheme of an HTTP
header is a secret whatever it looks like. Else it may be a sentence (`password: must be long`), so
that its looks decide, and of passwords whether it is all that follows. In a traceback's lines of
code only what is in quotes is a secret; the rest are names (`connect(password=password)`).
"""

import re

# Of a signature, more: what else is called so has types in it, or is of a file's first bytes.
MIN_CHARS, MIN_SIGNATURE_CHARS = 6, 20
# Numbers of tokens are shorter than tokens that are a number, and so are words after a scheme.
MIN_TOKEN_CHARS = 8
# Words are shorter, and secrets without a digit mostly are not.
MIN_WORD_CHARS = 24
# By so many its looks are told: of a long word that is full of names, each would look at the rest.
MAX_LOOK_CHARS = 200

NAME = (
    r"(?:token|secret|passw(?:or)?d|passphrase|signature|(?<![\w-])sig|credentials?|authorization"
    r"|(?:api|access|account|secret|shared|private)(?:[ _-]?access)?[ _-]?key(?:[ _-]?id)?)"
)
# From a word's first letter on: from each of a long one's, it would take a day. After the name, its
# own quote, as often escaped as JSON within JSON has it. `::`, `:=` and `==` say nothing of values.
_NAMED = re.compile(
    r"(?<![\w-])(?:(?P<scheme>[\w-]*authorization: {0,3}(?:basic|bearer|digest|negotiate|token) +)"
    rf"|[\w-]*(?P<name>{NAME})\\{{0,7}}[\"']?\]?(?P<sign>[ \t]{{0,3}}[:=](?![:=])[ \t]{{0,3}})"
    rf"|(?:--[\w-]*{NAME}|bearer)[ \t]+)"
    r"(?:[bru]{0,2}(?P<opening>\\{0,7}[\"'])(?!\s)|(?=[^\s\"'`<>&;,]))",
    re.IGNORECASE,
)
# To a blank, or to what closes or goes on with something else: `a&b=`, but not the & of `a&b`.
_VALUE = re.compile(r"(?:[^\s\"'`<>&;,]|[\"'`<>&;,](?=[^\s\"'`<>&;,)\]}])(?![\w.%-]*[:=]))*")
# A quote within words is part of what is quoted, and so is a double one.
_QUOTES = {quote: re.compile(rf"(?<!\\)(\\*){quote}(?![\w{quote}])|[\r\n]") for quote in "\"'"}
_LINES_OF_CODE = re.compile(r'(^ *File "[^"\n]*", line \d+.*(?:\n {4}.*)+)', re.MULTILINE)

# Of which one word may be said as well.
_OFTEN_SINGLE = frozenset({"token", "credential", "credentials", "authorization"})
_NO_VALUES = frozenset({"false", "none", "null", "true"})
_NO_SECRETS = frozenset(
    {
        *("no", "not", "ok", "set", "unset", "yes"),
        *("changed", "denied", "empty", "expected", "expired", "given", "hidden", "incorrect"),
        *("invalid", "missing", "prompt", "redacted", "rejected", "required", "unknown", "wrong"),
    }
)
_CLOSING = ",;.:)]}\\"
_PATH = re.compile(r"~?(?:/[a-z][a-z0-9._-]*){2,}")
_LETTER, _SYMBOL = re.compile(r"[A-Za-z]"), re.compile(r"[!@#$%^&+=~]")
_BASE64 = re.compile(r"[\w+/=-]+")


def without_named(text: str, *, mask: str) -> str:
    """A text whose secrets after their names are replaced by `mask`; twice changes no more."""
    parts = _LINES_OF_CODE.split(text)  # a text and lines of code by turns
    parts[::2] = [_without(part, mask=mask, is_code=False) for part in parts[::2]]
    parts[1::2] = [_without(part, mask=mask, is_code=True) for part in parts[1::2]]
    return "".join(parts)


def _without(text: str, *, mask: str, is_code: bool) -> str:
    parts: list[str] = []
    first = 0
    while (found := _NAMED.search(text, first)) is not None:
        parts.append(text[first : found.end()])
        first = found.end()
        if found["opening"]:
            end = _end_of_quotation(text, first, opening=found["opening"])
        else:
            end = first if is_code else _end_of_secret(text, found)
        if end > first:
            parts.append(mask)
            first = end
    return "".join([*parts, text[first:]])


def _end_of_quotation(text: str, first: int, *, opening: str) -> int:
    """Where its quote comes again, as often escaped; at the line's end, if it does not."""
    for found in _QUOTES[opening[-1]].finditer(text, first):
        if found[1] is None:
            return found.start()
        # Each level of quotation doubles the backslashes of the content and adds one to its quotes.
        num_own = len(found[1]) % (2 * len(opening))
        if num_own < len(opening):
            return found.end() - 1 - num_own
    return len(text)


def _end_of_secret(text: str, found: re.Match[str]) -> int:
    """Where the secret without quotes ends that begins after its name; there, if there is none."""
    first = found.end()
    word = _value_at(text, first, end=first + MAX_LOOK_CHARS)
    value = word.rstrip(_CLOSING)
    after = text[first + len(word) : first + len(word) + 1]
    is_alone = word[len(value) :].strip(".:") != "" or after in ("", *"\r\n\"'<>`;,")
    if not _is_secret(value, found=found, is_alone=is_alone):
        return first
    return first + len(_value_at(text, first, end=len(text)).rstrip(_CLOSING))


def _value_at(text: str, first: int, *, end: int) -> str:
    found = _VALUE.match(text, first, end)
    return "" if found is None else found.group()


def _is_secret(value: str, *, found: re.Match[str], is_alone: bool) -> bool:
    name = (found["name"] or "token").lower()
    if not value.strip("*") or value.lower() in _NO_VALUES:
        return False  # hidden by others, or none
    if found["sign"] == "=" or (found["scheme"] and len(value) >= MIN_TOKEN_CHARS):
        return True
    if value.lower() in _NO_SECRETS or "://" in value or _PATH.fullmatch(value):
        return False
    num_digits = sum(map(str.isdigit, value))
    has_letter, has_symbol = _LETTER.search(value) is not None, _SYMBOL.search(value) is not None
    is_mixed = num_digits > 0 and has_letter
    if name in ("signature", "sig"):
        return is_mixed and len(value) >= MIN_SIGNATURE_CHARS
    if is_mixed and len(value) >= MIN_CHARS:
        return True
    if len(value) >= MIN_WORD_CHARS and _BASE64.fullmatch(value):
        return True
    if name in _OFTEN_SINGLE:
        return num_digits >= MIN_TOKEN_CHARS or (has_symbol and len(value) >= MIN_TOKEN_CHARS)
    return is_alone or has_symbol or num_digits >= MIN_CHARS
