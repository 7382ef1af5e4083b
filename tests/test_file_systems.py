"""Tests of engine/publishing/file_systems.py."""

import botocore.session
import fsspec
import pytest
from botocore.parsers import create_parser

from engine.publishing.file_systems import file_system_errors, open_file_system


def test_opens_a_file_system_and_finds_the_path_within_it():
    fs, path = open_file_system("memory://folder/file")
    fs.pipe_file(path, b"content")
    with fsspec.open("memory://folder/file", "rb") as file:
        assert file.read() == b"content"


def test_user_and_password_of_an_http_uri_are_not_part_of_the_path():
    fs, path = open_file_system("https://user:p%40ss@host:8443/a%20b/c.parquet?d=e")
    assert path == "https://host:8443/a%20b/c.parquet?d=e"
    assert fs.client_kwargs == {"headers": {"Authorization": "Basic dXNlcjpwQHNz"}}
    fs, path = open_file_system("https://host/a@2x.parquet")
    assert path == "https://host/a@2x.parquet"
    assert fs.client_kwargs == {}


def test_an_unknown_kind_of_file_system_is_a_value_error():
    with pytest.raises(ValueError, match="nope"):
        open_file_system("nope://folder")


def test_no_credentials_are_among_the_errors(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    with pytest.raises(file_system_errors(), match="credentials"):
        fs.ls("bucket/folder")


def test_an_endpoint_that_nobody_listens_at_is_among_the_errors(monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fs = fsspec.filesystem(
        "s3", key="k", secret="s", endpoint_url="http://127.0.0.1:1", skip_instance_cache=True
    )
    with pytest.raises(file_system_errors(), match="Could not connect"):
        fs.ls("bucket/folder")


def test_an_answer_that_cannot_be_parsed_is_among_the_errors():
    model = botocore.session.get_session().get_service_model("sts")
    operation = model.operation_model("GetCallerIdentity")
    answer = {"status_code": 200, "headers": {}, "body": b"<GetCallerIdentityResponse><Acc"}
    with pytest.raises(file_system_errors(), match="invalid XML"):
        create_parser(model.protocol).parse(answer, operation.output_shape)


def test_a_bug_is_not_among_the_errors():
    assert not issubclass(TypeError, file_system_errors())
