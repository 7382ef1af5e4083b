"""Tests of engine/redaction.py."""

import pickle

import pytest

from engine.errors import CheckpointError
from engine.redaction import public_uri, redacted, without_secrets


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("s3://bucket/products", "s3://bucket/products"),
        ("s3://AKIA:s3cr3t@bucket/products", "s3://***@bucket/products"),
        ("s3://AKIA:s3/cr@3t@bucket/products", "s3://***@bucket/products"),
        ("--catalog=https://t0ken@host/a?sig=s3cr3t#s3cr3t", "--catalog=https://***@host/a?***"),
        ("simplecache::https://host:80/a?sig=s3cr3t", "simplecache::https://host:80/a?***"),
        ("https://u:s3?cr3t#@host/a", "https://***@host/a"),
        ("https://u:s3cr3t@host:80/a", "https://***@host:80/a"),
        ("https://t0k?en@host/a", "https://***@host/a"),
        ("S3://AKIA:1/cr3t@bucket/a", "S3://***@bucket/a"),
        ("http://minio:9000/shoe@2x.jpg", "http://minio:9000/shoe@2x.jpg"),
        ("a::hdfs://[::1]:80/a@b/c", "a::hdfs://[::1]:80/a@b/c"),
        ("http://[::1]/a@b/c", "http://[::1]/a@b/c"),
        (
            "abfs://images@account.dfs.core.windows.net/a",
            "abfs://images@account.dfs.core.windows.net/a",
        ),
        ("abfs://u:s3cr3t@account.example/a?sig=s3cr3t", "abfs://***@account.example/a?***"),
        ("folder/what?.parquet", "folder/what?.parquet"),
        ("--hf-token=hf_s3cr3t", "--hf-token=***"),
        ("--accept", "--accept"),
        ("10.0.0.0/8", "10.0.0.0/8"),
    ],
)
def test_a_command_is_kept_without_its_secrets(word: str, expected: str):
    assert without_secrets(["nightly", word]) == ("nightly", expected)


def test_the_word_after_an_option_for_a_secret_is_one():
    words = ["serve", "--token", "s3cr3t", "--store", "s3://bucket", "--db-password", "--odd"]
    expected = ("serve", "--token", "***", "--store", "s3://bucket", "--db-password", "***")
    assert without_secrets(words) == expected
    words = ["--token-file", "/etc/token", "--key-column", "id"]
    assert without_secrets(words) == tuple(words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "store s3://AKIA:s3cr3t@bucket/a: snapshots cannot be read: no",
            "store s3://***@bucket/a: snapshots cannot be read: no",
        ),
        (
            "see https://h/a?X-Amz-Signature=s3cr3t, or 'https://h/b#s3cr3t'.",
            "see https://h/a?***, or 'https://h/b?***'.",
        ),
        ('Invalid bucket name "AKIA:s3/cr3t@bucket": no', 'Invalid bucket name "***@bucket": no'),
        ("ClientError(url='ftp://u:s3cr3t@h/')", "ClientError(url='ftp://***@h/')"),
        ("AWS_SECRET_ACCESS_KEY=s3cr3t is wrong", "AWS_SECRET_ACCESS_KEY=*** is wrong"),
        ("{'SecretAccessKey': 's3cr3t', 'a': 'b'}", "{'SecretAccessKey': '***', 'a': 'b'}"),
        ("Authorization: Basic czNjcjN0OnMzY3IzdA==", "Authorization: Basic ***"),
        (
            "AccountName=a;AccountKey=s3cr3t+/==;EndpointSuffix=core.windows.net",
            "AccountName=a;AccountKey=***;EndpointSuffix=core.windows.net",
        ),
        (
            "BlobEndpoint=https://a.example/;SharedAccessSignature=sv=2026&sp=r&sig=s3cr3t%3D;",
            "BlobEndpoint=https://a.example/;SharedAccessSignature=***&sp=r&sig=***;",
        ),
        (
            "SharedAccessKeyName=root;SharedAccessKey=s3cr3t=",
            "SharedAccessKeyName=root;SharedAccessKey=***",
        ),
        ("password: s3cr3t@host", "password: ***"),
    ],
)
def test_a_text_loses_its_secrets_and_nothing_else(text: str, expected: str):
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "--token-file gone: cannot be read ([Errno 2] No such file or directory: 'gone')",
        "max_tokens=77: expected at least 1; pad_token_id=0",
        "catalog s3://bucket/a@2x: key column 'key' must be a string",
        "write to images@example.com at 12:30, or see http://host:80/a",
        "store C:\\folder: 10.0.0.0/8 ::1 a::b https://[::1]:80/a",
        "image http://minio:9000/shoe@2x.jpg, or https://[2001:db8::1]:80/shoe@2x.jpg: gone",
        "key=b17, weight=-0.5, access=all, secretary=none",
    ],
)
def test_what_is_no_secret_stays(text: str):
    assert redacted(text) == text


def test_the_environments_secrets_are_found_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("PROXY_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("PGPASSWORD", "sesame-open")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("GIT_TOKEN_FILE", "/run/secrets/git")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    monkeypatch.setenv("SHORT_TOKEN", "on")
    text = "hf_abcdefghij hf_abcdefgh xwJalrXUtnFEMI/K7MDENGx /run/secrets/git sometimes on"
    assert redacted(text) == "*** *** x***x /run/secrets/git sometimes on"
    assert redacted("sesame-open") == "***"


def test_errors_hold_no_secret_wherever_they_go():
    error = CheckpointError("checkpoint https://u:s3cr3t@host/a?token=s3cr3t: no")
    for shown in (str(error), repr(error), str(pickle.loads(pickle.dumps(error)))):
        assert "s3cr3t" not in shown
        assert "checkpoint https://***@host/a?***" in shown


@pytest.mark.parametrize(
    "text",
    [
        *("z" * 300_000, "z-" * 100_000 + ":x", "@" + "z:" * 100_000),
        *("a://" * 60_000, "s3://a:b" * 30_000, "a@s3://" + "a:b://" * 30_000, "://[::" * 40_000),
    ],
)
def test_long_words_are_looked_through_once(text: str):
    """And not from each of their letters on, which for these takes hours."""
    assert redacted(text) == text


def test_a_uri_alone_is_not_searched_for_more():
    assert public_uri("s3://bucket/token=1") == "s3://bucket/token=1"
