"""Strips secrets that stand after their name and a colon, as people and YAML write them.

Knows nothing of URIs, headers or quotations. `password: x` may be a secret, `password: must be 8
characters` is none: what follows the name is judged by its looks, and of passwords by whether it
is all that follows.
"""

import re

# Of a signature, more: what else is called so has types in it, or is of a file's first bytes.
MIN_CHARS, MIN_SIGNATURE_CHARS = 6, 20
# Words are shorter, and secrets without a digit mostly are not.
MIN_WORD_CHARS = 24
# By so many its looks are told: of a long word that is full of names, each would look at the rest.
MAX_LOOK_CHARS = 200

# Of what is one; between words, a blank is as good as a line.
NAME = (
    r"token|secret|passw(?:or)?d|passphrase|signature|credentials?"
    r"|(?:api|access|account|secret|shared|private)(?:[ _-]?access)?[ _-]?key(?:[ _-]?id)?"
)
# `name = x` as well, which may be a line of code in a traceback. `::` and `==` are neither.
_SPOKEN = re.compile(
    rf"(?<![\w-])[\w-]*({NAME})[\"']?[ \t]{{0,3}}[:=][ \t]{{0,3}}(?=[^\s\"'<>`:=])", re.IGNORECASE
)
_VALUE = re.compile(r"[^\s\"'<>`]*")
# Of which one word may be said as well.
_OFTEN_SINGLE = frozenset({"token", "signature", "credential", "credentials"})
_NO_SECRETS = frozenset(
    {
        *("any", "bool", "bytes", "false", "int", "no", "none", "not", "null", "ok", "optional"),
        *("set", "str", "true", "unset", "yes"),
        *("changed", "denied", "empty", "expected", "expired", "given", "hidden", "incorrect"),
        *("invalid", "missing", "prompt", "redacted", "rejected", "required", "unknown", "wrong"),
    }
)
_CLOSING = ",;.:)]}"
_PATH = re.compile(r"~?(?:/[a-z][a-z0-9._-]*){2,}")
_DIGIT, _LETTER = re.compile(r"\d"), re.compile(r"[A-Za-z]")
_SYMBOL = re.compile(r"[!@#$%^&*+=~]")
_BASE64 = re.compile(r"[\w+/=-]+")


def without_spoken(text: str, *, mask: str) -> str:
    """A text whose secrets after a colon are replaced by `mask`; twice changes no more."""
    parts: list[str] = []
    first = 0
    while (found := _SPOKEN.search(text, first)) is not None:
        parts.append(text[first : found.end()])
        first = found.end()
        if text.startswith(mask, first):
            continue  # gone already
        end = _end_of_secret(text, first, name=found[1].lower())
        if end > first:
            parts.append(mask)
            first = end
    return "".join([*parts, text[first:]])


def _end_of_secret(text: str, first: int, *, name: str) -> int:
    """Where the secret ends that begins there; there, too, if there is none."""
    end = _end_of_word(text, first, most=first + MAX_LOOK_CHARS)
    word = text[first:end]
    value = word.rstrip(_CLOSING)
    is_closed = word[len(value) :].strip(".:") != ""
    is_alone = is_closed or text[end : end + 1] in ("", *"\r\n\"'<>`")
    if not _is_secret(value, name=name, is_alone=is_alone):
        return first
    return first + len(text[first : _end_of_word(text, end, most=len(text))].rstrip(_CLOSING))


def _end_of_word(text: str, first: int, *, most: int) -> int:
    found = _VALUE.match(text, first, most)
    return first if found is None else found.end()


def _is_secret(value: str, *, name: str, is_alone: bool) -> bool:
    if not value.strip("*") or "://" in value or _PATH.fullmatch(value):
        return False  # hidden by others, or a place
    has_digit = _DIGIT.search(value) is not None
    is_mixed = has_digit and _LETTER.search(value) is not None
    if name == "signature":
        return is_mixed and len(value) >= MIN_SIGNATURE_CHARS
    is_long = len(value) >= MIN_WORD_CHARS and _BASE64.fullmatch(value) is not None
    if is_long or (is_mixed and len(value) >= MIN_CHARS):
        return True
    if name in _OFTEN_SINGLE or "(" in value:  # a call, in a line of code
        return False
    return (is_alone and value.lower() not in _NO_SECRETS) or _SYMBOL.search(value) is not None
