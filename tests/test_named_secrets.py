"""Tests of engine/named_secrets.py: secrets after their names, sentences, and lines of code."""

import json
import re
import string
import traceback
from collections.abc import Callable
from textwrap import indent
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from engine.named_secrets import without_named
from engine.redaction import redacted, without_secrets

PASSWORDS = ("password", "Passwd", "db_password", "passphrase", "client_secret", "Secret")
KEYS = ("api key", "API_KEY", "access-key", "account key", "Secret Access Key", "SharedAccessKey")
TOKENS = ("token", "X-Amz-Security-Token", "credentials", "refresh_token")
NAMES = (*PASSWORDS, *KEYS, *TOKENS)
BETWEEN = (": ", ":", " : ", " = ", ":\t", "': ", '":', "        :  ", "\t\t\t\t= ")
# What they stand in; a secret ends where it does.
AROUND = ("{}", "login failed ({}), again", "{}\nnext: line", "a {}; b", "{}.", "[{}]", "'{}'")
FRAME = '  File "a.py", line 7, in login\n    '


def named(text: str) -> str:
    return without_named(text, mask="***")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("password: x", "password: ***"),
        ("password: hunter", "password: ***"),
        ("Password : correct-horse, user: bob", "Password : ***, user: bob"),
        ("(password: hunter) at host", "(password: ***) at host"),
        ("{password: hunter,user: bob}", "{password: ***,user: bob}"),
        ("password: p@ss and more", "password: *** and more"),
        ("password: 123456 was refused", "password: *** was refused"),
        ("a token: 12345678 of old", "a token: *** of old"),
        ("token: a1b2c3 was refused", "token: *** was refused"),
        ("secret access key: wJalrXUtnFEMI/K7MDENG", "secret access key: ***"),
        ("api key = abc123def", "api key = ***"),
        ("AccountKey: Zm9v0/==; Endpoint", "AccountKey: ***; Endpoint"),
        ("X-Amz-Security-Token: FwoGZXIvYXdzEJr4", "X-Amz-Security-Token: ***"),
        ("Signature: 5d672d79c15b13162d9279b0855cfba6789a8edb", "Signature: ***"),
        ("password: %s", "password: ***"),
        ("password: &abc123x", "password: ***"),
        ("bad credentials: password: hunter", "bad credentials: password: ***"),
        (f"token: {'ab1/' * 200}, next", "token: ***, next"),
        # After = without a blank, whatever it looks like.
        ("?a=1&sig=secret&b=2", "?a=1&sig=***&b=2"),
        ("password=must be given", "password=*** be given"),
        ("password=a&b;c,d\"e'f<g user=bob", "password=*** user=bob"),
        ("Config(password=hunter, token=None)", "Config(password=***, token=None)"),
        ("Server=h;Password=hunter;Encrypt=yes", "Server=h;Password=***;Encrypt=yes"),
        ("Server=h;PWD=hunter2;UID=sa", "Server=h;PWD=***;UID=sa"),
        ("password=&hunter", "password=***"),
        ("password=<hunter", "password=***"),
        ("password==hunter", "password=***"),
        ("password:=hunter1", "password:***"),
        ("MYSQL_PWD=hunter OLDPWD=/srv", "MYSQL_PWD=*** OLDPWD=/srv"),
        ("fs.s3a.secret.key=hunter", "fs.s3a.secret.key=***"),
        ("{'secretKey': 'a', 'private_key': 'b'}", "{'secretKey': '***', 'private_key': '***'}"),
        # Of what holds names of its own, these count.
        ("fs(token={'client_secret': 'hunter'})", "fs(token={'client_secret': '***'})"),
        ('{"secret":{"password":"hunter"}}', '{"secret":{"password":"***"}}'),
        ("secret=[{'password': 'hunter'}]", "secret=[{'password': '***'}]"),
        ("password={'hunter'}", "password=***'}"),
        ("Server=h;Pwd={hunter;x};UID=sa", "Server=h;Pwd=***};UID=sa"),
        ("token=Bearer hunter", "token=Bearer ***"),
        # In quotes: to the same quote, as often escaped; to the line's end, if there is none.
        (r'{"password": "a\"b\\", "user": "bob"}', '{"password": "***", "user": "bob"}'),
        (r"Config(password='a\'b', user='bob')", "Config(password='***', user='bob')"),
        ("password: 'it's''s', user: 'bob'", "password: '***', user: 'bob'"),
        ("{'password': \"it's\", 'user': 1}", "{'password': \"***\", 'user': 1}"),
        (r'"{\"token\": \"a\\\"b\", \"n\": 1}"', r'"{\"token\": \"***\", \"n\": 1}"'),
        (r'"{\"token\": \"hunter", "n": 1', r'"{\"token\": \"***", "n": 1'),
        ('{"password": "hunter and more', '{"password": "***'),
        ('password: "hunter and\nmore", he said', 'password: "***\nmore", he said'),
        ("password='', user='bob'", "password='', user='bob'"),
        ("Config(password='hunter', token=b'hunter')", "Config(password='***', token=b'***')"),
        ("config['password'] = 'hunter'", "config['password'] = '***'"),
        ("password=f'hunter' again", "password=f'***' again"),
        ("api_key: `abc123def`", "api_key: `***`"),
        # In headers and on command lines.
        ("Authorization: Basic abcdefgh", "Authorization: Basic ***"),
        ("{'Authorization': 'Bearer hunter'}", "{'Authorization': '***'}"),
        ("-H 'Proxy-Authorization: Token hunter2x'", "-H 'Proxy-Authorization: Token ***'"),
        ("A=Authorization=Basic dXNlcjp4, B=c", "A=Authorization=Basic ***, B=c"),
        ("Authorization=Basic hush", "Authorization=Basic ***"),
        ("A=Authorization=Bearer eyJhbGc.eyJz", "A=Authorization=Bearer ***"),
        ("Authorization = Basic dXNlcjp4", "Authorization = Basic ***"),
        ("authorization:\tBasic dXNlcjp4", "authorization:\tBasic ***"),
        ("'Authorization': Basic dXNlcjp4", "'Authorization': Basic ***"),
        ("Authorization: ApiKey abcdefgh", "Authorization: ApiKey ***"),
        ("Authorization: NTLM TlRMTVNTUAABAAAAB4IIAA==", "Authorization: ***"),
        ("authorization: hunterhunter", "authorization: ***"),
        ("authorization=hunter was refused", "authorization=*** was refused"),
        # Of other schemes they go, too.
        ("Authorization: Odd-Scheme abc123, twice", "Authorization: ***, twice"),
        ("Authorization=Odd abc123 twice", "Authorization=*** twice"),
        ("sent Bearer s3cr3t-s3cr3t twice", "sent Bearer *** twice"),
        ("serve --token s3cr3t --port 80", "serve --token *** --port 80"),
        ("serve --token 'hunter' --port 80", "serve --token '***' --port 80"),
        ("['serve', '--token', 'hunter', '--port']", "['serve', '--token', '***', '--port']"),
        # In XML and PEM.
        (
            "<SecretAccessKey>x</SecretAccessKey><a>b</a>",
            "<SecretAccessKey>***</SecretAccessKey><a>b</a>",
        ),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nbye",
            "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\nbye",
        ),
    ],
)
def test_what_looks_like_a_secret_is_one(text: str, expected: str):
    assert named(text) == expected
    assert redacted(text) == redacted(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "password: must be 8 characters or more",
        "password: required",
        "token: expected printable ASCII characters alone",
        "unexpected token: identifier",
        "token: 256000",
        "credentials: none found; see https://host/a1",
        "credentials: /etc/clipmill/keys/token1",
        "No loop matching the specified signature: (dtype('float32'), int64)",
        "signature: tensor(float16)",
        "signature: 0x89504e47 is not that of a PNG",
        "Token::new1234 and token == b2c3d4e5 and (token := b2c3d4e5)",
        "key: b17x99aa; monkey: abc123def",
        "password: ***",
        "secrets: a1b2c3d4",
        "api key: https://host/docs1 says how",
        "requests must carry a bearer token; use bearer authentication, or Basic python3",
        "'token=' is missing; name it with --token or in 'a token' file",
        "expected 'token=', found 'abc' at line 3",
        'startswith("token=") failed for row 7',
        r'{"message": "expected \"token=\", found \"abc\""}',
        "authorization: required; authorization must be given",
        "signature: fixed_size_binary[64]",
        "signature=image[N,224,224,3]",
        "api_key: string",
        "GET /a?token=&user=bob and Server=h;Password=;Encrypt=yes",
        "PWD=/srv/bob",
        "usage: serve [--token TOKEN] [--token-file FILE]",
    ],
)
def test_a_sentence_is_none(text: str):
    assert named(text) == text


@pytest.mark.parametrize(
    "code",
    [
        "connect(user, password=self.password2, token=read_token(), api_key=keys[1])",
        "password = getpass.getpass()",
        "password: str",
        "headers = dict(authorization=f(token))",
        "def login(token: str, password: str | None = None) -> None:",
        "connect(\n        password=password,\n    )\n    ^^^^^^^^",
    ],
)
def test_a_line_of_code_names_what_it_does_not_hold(code: str):
    trace = f"Traceback (most recent call last):\n{FRAME}{code}\n"
    assert named(trace) == trace


@pytest.mark.parametrize("indentation", ["", "    "])
def test_what_code_holds_in_quotes_and_what_follows_it_is_a_secret(indentation: str):
    text = f"{FRAME}f(password='hunter', token=token)\nError: password=hunter, token=hunter"
    expected = f"{FRAME}f(password='***', token=token)\nError: password=***, token=***"
    assert named(indent(text, indentation)) == indent(expected, indentation)


def test_code_is_told_as_python_prints_it():
    def connect(*, password: str, token: str) -> None:
        raise ValueError(f"refused: password={password}, token={token}")

    password = token = "hunter"
    try:
        connect(password=password, token=token)
    except ValueError:
        found = redacted(traceback.format_exc())
    assert "    connect(password=password, token=token)\n" in found
    assert "ValueError: refused: password=***, token=***" in found


# In quotes anything that is there at all; else what a blank or a quote does not end, and what is
# none of the words that stand in for a secret.
QUOTABLE = st.text(st.characters(codec="utf-8"), min_size=8, max_size=40).filter(
    lambda value: not value[0].isspace()
)
PLAIN = st.builds(
    str.__add__,
    st.sampled_from(("", *"&;,<>")),
    st.text(string.ascii_letters + string.digits + "+/_-!@$%^*=~#?", min_size=8, max_size=40),
).filter(
    # Not of stars alone, which are hidden; nor `&a=`, which is the next one's name.
    lambda value: value.strip("*=") != "" and not re.match(r"[&;,<>][\w.%-]*=", value)
)
MIXED = PLAIN.filter(lambda value: any(map(str.isdigit, value)) and any(map(str.isalpha, value)))
NUMBERS = st.text(string.digits, min_size=8, max_size=20)

QUOTED: dict[str, Callable[[str, str], str]] = {
    "JSON": lambda name, secret: json.dumps({name: secret, "user": "bob"}),
    "JSON in JSON": lambda name, secret: json.dumps({"a": json.dumps({name: secret})}),
    "compact JSON": lambda name, secret: json.dumps({name: secret, "a": 1}, separators=(",", ":")),
    "Python": lambda name, secret: f"Config(user='bob', {name}={secret!r}, port=80)",
    "dict": lambda name, secret: f"{ {name: secret, 'user': 'bob'} }",
    "bytes": lambda name, secret: f"{name}={secret.encode()!r}",
}


@given(st.sampled_from(sorted(QUOTED)), st.sampled_from(NAMES), QUOTABLE)
@example("JSON", "password", "aaaaaaa\\")
@example("JSON in JSON", "token", 'aaaa"aaa\\')
@example("Python", "token", "aaaa'aa\"\\")
def test_of_what_is_quoted_all_goes_and_nothing_else(form: str, name: str, secret: str):
    write = QUOTED[form]
    found = redacted(write(name, secret))
    assert found == redacted(found)
    assert found.replace('"***"', "'***'") == write(name, "***").replace('"***"', "'***'")


WRITTEN = {
    "pair": "cannot log in with {name}={secret}, user=bob",
    "query": "GET /a?user=bob&{name}={secret}&b=2",
    "connection": "Server=h;{name}={secret};Encrypt=yes",
    "YAML": "user: bob\n{name}: {secret}\nport: 80",
    "header": "> Host: h\n> X-{name}: {secret}\n> Accept: */*",
    "option": "serve --store a --{name}={secret} --port 80",
    "words": "serve --store a --{name} {secret} --port 80",
    "said": "the {name}: {secret} was refused",
    "Basic": "Authorization: Basic {secret}\nAccept: */*",
    "Bearer": "'Authorization: Bearer {secret}' was refused",
}


@given(
    st.sampled_from(sorted(WRITTEN)),
    st.sampled_from([name for name in NAMES if " " not in name]),
    MIXED | NUMBERS,
)
def test_nothing_is_left_of_a_secret_and_all_of_the_rest(form: str, name: str, secret: str):
    assume(form != "words" or secret[0] != "=")  # which is a sign there, and is left
    text = WRITTEN[form].format(name=name, secret=secret)
    assert redacted(text) == WRITTEN[form].format(name=name, secret="***")


@given(st.sampled_from(["pair", "query", "connection", "option", "Basic"]), PLAIN)
def test_where_it_must_be_a_secret_its_looks_do_not_count(form: str, secret: str):
    text = WRITTEN[form].format(name="token", secret=secret)
    assert redacted(text) == WRITTEN[form].format(name="token", secret="***")


@given(
    QUOTABLE.filter(lambda value: value[-1] != "."),
    PLAIN.filter(lambda value: value[0] not in "<>"),  # which end a URI
)
def test_of_what_is_part_of_a_uri_nothing_is_left(secret: str, plain: str):
    encoded = quote(secret, safe="")
    for text, expected in (
        (f"at s3://bob:{encoded}@bucket/a: no", "at s3://***@bucket/a: no"),
        (f"at s3://bob:{plain}@bucket/a: no", "at s3://***@bucket/a: no"),
        (f"at 'https://{encoded}@host/a'", "at 'https://***@host/a'"),
        (f"at https://host/a?b={encoded}, twice", "at https://host/a?***, twice"),
    ):
        assert redacted(text) == expected


@given(PLAIN)
def test_of_an_option_for_one_the_next_word_is_a_secret(secret: str):
    words = ("serve", "--db-password", secret, f"--token={secret}", "--port", "80")
    expected = ("serve", "--db-password", "***", "--token=***", "--port", "80")
    assert without_secrets(words) == expected


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
@example(name="password", between=":", around="{}", secret="=000000A", before="a b")
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


PARTS = (
    *(
        *NAMES,
        *BETWEEN,
        "a1b2c3",
        "x",
        " ",
        "***",
        "'",
        "(",
        "\n",
        "authorization",
        "Basic ",
        "Odd ",
    ),
    *("=", "&", "`", "<token>", "</token>", "-----BEGIN PRIVATE KEY-----", "-----", FRAME),
)


@given(st.lists(st.sampled_from(PARTS)))
def test_twice_is_as_once(parts: list[str]):
    once = redacted("".join(parts))
    assert redacted(once) == once


@pytest.mark.parametrize(
    "text",
    [
        *("password" * 40_000, "token: " * 40_000, "token:" * 40_000, "password: x" * 30_000),
        *('token="' * 40_000, "token=''" * 40_000, "token=" + "&" * 300_000, "-" * 300_000),
        *('token="' + "\\" * 300_000, f"{FRAME}token=(" * 20_000, "token=a;" * 40_000),
        *('File "a", line ' + "7" * 300_000, "token" + "=" * 300_000, "token =\t" * 40_000),
        *("'" + "token=" * 40_000, "'token=' " * 40_000, "authorization: a " * 30_000),
        *("<token>a" * 40_000, "-----BEGIN A PRIVATE KEY-----" * 10_000),
    ],
)
def test_long_texts_are_looked_through_once(text: str):
    """And not from each of their names on, which for these takes hours."""
    assert named(named(text)) == named(text)
