"""Tests of pipelines/error_lines.py."""

from pipelines.error_lines import MAX_CHARACTERS, error_line


def test_an_error_is_told_in_one_line():
    assert error_line(ValueError("a:\n  b\n  c\n")) == "ValueError: a: b c"
    assert error_line(ValueError()) == "ValueError"
    assert len(error_line(ValueError("x" * 9_999))) == MAX_CHARACTERS


def test_secrets_of_its_uris_are_not_told():
    line = error_line(OSError("s3://me:secret@bucket/a and https://x/y?token=secret are gone"))
    assert line == "OSError: s3://***@bucket/a and https://x/y?*** are gone"
