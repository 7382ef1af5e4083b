"""Tests of engine/spoken_secrets.py: secrets after a colon, and sentences."""

import string
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.redaction import redacted
from engine.spoken_secrets import without_spoken

PASSWORDS = ("password", "Passwd", "db_password", "passphrase", "client_secret", "Secret")
KEYS = ("api key", "API_KEY", "access-key", "account key", "Secret Access Key", "SharedAccessKey")
TOKENS = ("token", "X-Amz-Security-Token", "credentials", "refresh_token")
NAMES = (*PASSWORDS, *KEYS, *TOKENS)
BETWEEN = (": ", ":", " : ", " = ", ":\t", "': ", '":')
# What they stand in; a secret ends where it does.
AROUND = ("{}", "login failed ({}), again", "{}\nnext: line", "a {}; b", "{}.", "[{}]", "'{}'")


def spoken(text: str) -> str:
    return without_spoken(text, mask="***")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("password: x", "password: ***"),
        ("password: hunter", "password: ***"),
        ("Password : correct-horse, user: bob", "Password : ***, user: bob"),
        ("(password: hunter) at host", "(password: ***) at host"),
        ("password: p@ss and more", "password: *** and more"),
        ("token: a1b2c3 was refused", "token: *** was refused"),
        ("secret access key: wJalrXUtnFEMI/K7MDENG", "secret access key: ***"),
        ("api key = abc123def", "api key = ***"),
        ("AccountKey: Zm9v0/==; Endpoint", "AccountKey: ***; Endpoint"),
        ("X-Amz-Security-Token: FwoGZXIvYXdzEJr4", "X-Amz-Security-Token: ***"),
        ("Signature: 5d672d79c15b13162d9279b0855cfba6789a8edb", "Signature: ***"),
        ("password: %s", "password: ***"),
        ("bad credentials: password: hunter", "bad credentials: password: ***"),
        (f"token: {'ab1/' * 200}, next", "token: ***, next"),
    ],
)
def test_what_looks_like_a_secret_is_one(text: str, expected: str):
    assert spoken(text) == expected
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "password: must be 8 characters or more",
        "password: required",
        "    password: str",
        "def login(token: str, password: str | None = None) -> None:",
        "    password = getpass.getpass()",
        "token: expected printable ASCII characters alone",
        "unexpected token: identifier",
        "token: 77",
        "credentials: none found; see https://host/a1",
        "credentials: /etc/clipmill/keys/token1",
        "No loop matching the specified signature: (dtype('float32'), int64)",
        "signature: tensor(float16)",
        "signature: 0x89504e47 is not that of a PNG",
        "Token::new1234 and token == b2c3d4e5",
        "key: b17x99aa; monkey: abc123def",
        "password: ***",
        "secrets: a1b2c3d4",
        "api key: https://host/docs1 says how",
    ],
)
def test_a_sentence_is_none(text: str):
    assert spoken(text) == text


SECRETS = st.text(string.ascii_letters + string.digits + "+/_-!@$%^&*=~", min_size=6, max_size=40)
MIXED = SECRETS.filter(
    lambda value: (
        any(map(str.isdigit, value)) and any(map(str.isalpha, value)) and value[0] not in "=*/~"
    )
)
WORDS = st.lists(
    st.text(string.ascii_lowercase, min_size=1, max_size=12), min_size=2, max_size=6
).map(" ".join)


@given(
    name=st.sampled_from(NAMES),
    between=st.sampled_from(BETWEEN),
    around=st.sampled_from(AROUND),
    secret=MIXED,
    before=WORDS,
)
@example(name="password", between=": ", around="{}", secret="aaaa0%2F==", before="a b")
def test_no_mixed_secret_is_left(name: str, between: str, around: str, secret: str, before: str):
    text = f"{before} {around.format(f'{name}{between}{secret}')}"
    found = redacted(text)
    assert secret not in found, text
    assert "***" in found
    assert found.startswith(before)
    assert redacted(found) == found


@given(
    name=st.sampled_from(PASSWORDS),
    between=st.sampled_from(BETWEEN),
    secret=st.text(string.ascii_letters, min_size=5, max_size=20).map(lambda word: f"Q{word}q"),
    ending=st.sampled_from(("", "\n", ")", ", then", "'", ";")),
)
def test_of_passwords_a_word_alone_is_one_too(name: str, between: str, secret: str, ending: str):
    assert secret not in redacted(f"{name}{between}{secret}{ending}")


@given(name=st.sampled_from(NAMES), said=WORDS, before=WORDS)
def test_prose_stays_as_it_is(name: str, said: str, before: str):
    for text in (f"{before} {name}: {said}", f"{before} {name} {said}", f"the {name}s: {said}"):
        assert redacted(text) == text


@given(st.lists(st.sampled_from((*NAMES, *BETWEEN, "a1b2c3", "x", " ", "***", "'", "(", "\n"))))
def test_twice_is_as_once(parts: list[str]):
    once = redacted("".join(parts))
    assert redacted(once) == once


@pytest.mark.parametrize(
    "text",
    ["password" * 40_000, "token: " * 40_000, "token:" * 40_000, "password: x" * 30_000],
)
def test_long_texts_are_looked_through_once(text: str):
    started = time.monotonic()
    spoken(text)
    assert time.monotonic() - started < 5
