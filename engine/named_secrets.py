"""Strips secrets that stand after their names: `password: x`, `token=x`, `"api_key": "x"`.

Knows nothing of URIs. What stands in quotes right after the name and its sign, what follows `=`
without a blank, and what follows a known scheme of an HTTP header, is a secret whatever it looks
like. Else it may be a sentence (`password: must be long`), so that its looks decide, and of
passwords whether it is all that follows. In a traceback's lines of code only what is in quotes is a
secret; the rest are names (`connect(password=password)`).
"""

import math
import re

# Of a signature, more: what else is called so is of a file's first bytes, or of types.
MIN_CHARS, MIN_SIGNATURE_CHARS = 6, 20
# Numbers of tokens are shorter than tokens that are a number, and so are words after a scheme.
MIN_TOKEN_CHARS = 8
# Words are shorter, and secrets without a digit mostly are not.
MIN_WORD_CHARS = 24
# By so many its looks are told: of a long word that is full of names, each would look at the rest.
MAX_LOOK_CHARS = 200

NAME = (
    r"(?:token|secret|passw(?:or)?d|passphrase|signature|sig|credentials?|authorization"
    r"|(?:api|access|account|secret|shared|private)[ ._-]?key(?:[ _-]?id)?"
    r"|pwd(?==[^/]))"  # else the folder that a process is in
)
# After these it may look like a word; after others it does not.
_SCHEMES = "(?:apikey|basic|bearer|oauth|token)"
# To a blank, or to what closes or goes on with something else: `a&b=`, but not the & of `a&b`.
_VALUE_CHAR = r"(?:[^\s\"'`<>&;,]|[\"'`<>&;,](?=[^\s\"'`<>&;,)\]}])(?![\w.%-]*[:=]))"
_VALUE = re.compile(f"{_VALUE_CHAR}*")
# After the name, its own quote, as often escaped as JSON within JSON has it. `::`, `:=` and ` == `
# say nothing of values.
_QUOTE, _BLANKS = r"\\{0,7}[\"'`]", r"[ \t]{0,40}"
_END = rf"(?:{_QUOTE})?\]?"
_SIGN = rf"{_BLANKS}[:=](?![:=]){_BLANKS}"
# It has names of its own, the first of which is no value.
_MAPPING = rf"\[?\{{{_QUOTE}[\w.-]+{_QUOTE}:"
# From a word's first letter on: from each of a long one's, it would take a day. A literal is a name
# in quotes with its sign (`expected 'token=', found 'a'`).
_NAMED = re.compile(
    rf"(?P<literal>{_QUOTE})[\w-]*{NAME}=(?P=literal)(?![^\s,;:.)\]}}])"
    rf"|(?<![\w-])(?:(?P<scheme>[\w-]*authorization{_END}{_SIGN}{_SCHEMES}[ \t]+)"
    rf"|[\w-]*(?P<name>{NAME}){_END}(?P<sign>{_SIGN}|[:=](?==+[^\s=]))(?:bearer[ \t]+)?"
    rf"|(?:--[\w-]*{NAME}(?:{_QUOTE},)?|bearer)[ \t]+)"
    rf"(?:[bruf]{{0,2}}(?P<opening>{_QUOTE})(?!\s)|(?!{_MAPPING})(?={_VALUE_CHAR}))",
    re.IGNORECASE,
)
# A quote within words is part of what is quoted, and so is a double one.
_QUOTES = {quote: re.compile(rf"(?<!\\)(\\*){quote}(?![\w{quote}])|[\r\n]") for quote in "\"'`"}
_OTHER_SCHEME = re.compile(r"[a-z-]{1,23}[ \t]+", re.IGNORECASE)
_KEY_BLOCK = re.compile(r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----)(?:(?!-----).)+", re.DOTALL)
_ELEMENT = re.compile(rf"(<[\w:-]*{NAME}>)[^<\r\n]+(?=</)", re.IGNORECASE)
# Deeper than its frame is: a traceback may stand indented.
_LINES_OF_CODE = re.compile(
    r'(^( *)File "[^"\n]*", line \d{1,9}\b[^\n]*(?:\n\2  [^\n]*)+)', re.MULTILINE
)

# Of which one word may be said as well.
_OFTEN_SINGLE = frozenset({"token", "credential", "credentials"})
_SIGNATURES = frozenset({"sig", "signature"})
_NO_VALUES = frozenset({"false", "none", "null", "true"})
_NO_SECRETS = frozenset(
    {
        *("no", "not", "ok", "set", "unset", "yes"),
        *("changed", "denied", "empty", "expected", "expired", "failed", "given", "hidden"),
        *("incorrect", "invalid", "missing", "prompt", "redacted", "rejected", "required"),
        *("unknown", "wrong"),
        *("binary", "bytes", "large_string", "str", "string"),
    }
)
_CLOSING = ",;.:)]}\\"
_PATH = re.compile(r"~?(?:/[a-z][a-z0-9._-]*){2,}")
_LETTER, _SYMBOL = re.compile(r"[A-Za-z]"), re.compile(r"[!@#$%^&+=~]")
_BASE64 = re.compile(r"[\w+/=-]+")


def without_named(text: str, *, mask: str) -> str:
    """A text whose secrets after their names are replaced by `mask`; twice changes no more."""
    text = _ELEMENT.sub(rf"\1{mask}", _KEY_BLOCK.sub(rf"\1{mask}", text))
    parts = _LINES_OF_CODE.split(text)  # a text, lines of code, their indentation by turns
    del parts[2::3]
    parts[::2] = [_without(part, mask=mask, is_code=False) for part in parts[::2]]
    parts[1::2] = [_without(part, mask=mask, is_code=True) for part in parts[1::2]]
    return "".join(parts)


def _without(text: str, *, mask: str, is_code: bool) -> str:
    parts: list[str] = []
    first = 0
    while (found := _NAMED.search(text, first)) is not None:
        parts.append(text[first : found.end()])
        first = end = found.end()
        if found["opening"]:
            end = _end_of_quotation(text, first, opening=found["opening"])
        elif not (is_code or found["literal"]):
            end = _end_of_secret(text, first, found=found)
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


def _end_of_secret(text: str, first: int, *, found: re.Match[str]) -> int:
    """Where the secret without quotes ends that begins after its name; there, if there is none."""
    name = (found["name"] or "token").lower()
    if name == "authorization" and (other := _OTHER_SCHEME.match(text, first)):
        end = _end_of_value(text, other.end(), name="token")
        if end > other.end():
            return end
    min_certain_chars: float = MIN_TOKEN_CHARS if found["scheme"] else math.inf
    if found["sign"] == "=" or "=" in (found["scheme"] or ""):
        min_certain_chars = 1
    return _end_of_value(text, first, name=name, min_certain_chars=min_certain_chars)


def _end_of_value(text: str, first: int, *, name: str, min_certain_chars: float = math.inf) -> int:
    """The same, of one word: from so many characters on it is a secret whatever it looks like."""
    word = _value_at(text, first, end=first + MAX_LOOK_CHARS)
    value = word.rstrip(_CLOSING)
    after = text[first + len(word) : first + len(word) + 1]
    is_alone = word[len(value) :].strip(".:") != "" or after in ("", *"\r\n\"'<>`;,")
    if value.strip("*") == "" or value.lower() in _NO_VALUES:
        return first  # hidden, or none
    if name in _SIGNATURES and not set(value).isdisjoint("[(<"):
        return first  # of a function or a model: types
    if len(value) < min_certain_chars and not _looks_secret(value, name=name, is_alone=is_alone):
        return first
    return first + len(_value_at(text, first, end=len(text)).rstrip(_CLOSING))


def _value_at(text: str, first: int, *, end: int) -> str:
    found = _VALUE.match(text, first, end)
    return "" if found is None else found.group()


def _looks_secret(value: str, *, name: str, is_alone: bool) -> bool:
    if value.lower().lstrip("<") in _NO_SECRETS or "://" in value or _PATH.fullmatch(value):
        return False
    num_digits = sum(map(str.isdigit, value))
    has_letter, has_symbol = _LETTER.search(value) is not None, _SYMBOL.search(value) is not None
    is_mixed = num_digits > 0 and has_letter
    if name in _SIGNATURES:
        return is_mixed and len(value) >= MIN_SIGNATURE_CHARS
    if is_mixed and len(value) >= MIN_CHARS:
        return True
    if len(value) >= MIN_WORD_CHARS and _BASE64.fullmatch(value):
        return True
    if name in _OFTEN_SINGLE:
        return num_digits >= MIN_TOKEN_CHARS or (has_symbol and len(value) >= MIN_TOKEN_CHARS)
    return is_alone or has_symbol or num_digits >= MIN_CHARS
