"""What a submitted job runs, in the folder that travelled."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ClipmillError
from jobs.submission import packing
from jobs.submission.entrypoint import STDOUT_MARK, MarkedLines
from jobs.submission.packing import pack
from jobs.submission.words import command_words

SNAPSHOTLESS = ("index", "--store", "/proc/nowhere")


def test_whole_lines_are_marked():
    stream = io.StringIO()
    lines = MarkedLines(stream)
    print("one\ntwo", end="", file=lines)
    assert stream.getvalue() == f"{STDOUT_MARK}one\n"
    print(" and more", file=lines)
    print("three", end="", file=lines)
    lines.end()
    lines.end()
    assert stream.getvalue() == "".join(
        f"{STDOUT_MARK}{line}\n" for line in ("one", "two and more", "three")
    )


def test_the_folder_is_all_that_the_command_needs(tmp_path: Path):
    pack(command_words(SNAPSHOTLESS, config=None), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("engine", "pipelines", "jobs", "submitted", "pyproject.toml", "constraints.txt"),
    }
    assert not list(tmp_path.rglob("__pycache__"))
    assert not (tmp_path / "jobs" / "demo").exists()
    environment = {name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH"}}
    for words, code, said in (
        (("engine", "lst"), 2, "no action 'lst'"),
        (("engine", "--help"), 0, f"{STDOUT_MARK}usage: clipmill engine"),
    ):
        (tmp_path / packing.WORDS_PATH).write_text(json.dumps(words))
        done = subprocess.run(
            [sys.executable, "-m", "jobs.submission.entrypoint"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout
        assert said in done.stdout


INSTALLED = """
import pathlib
from jobs.submission import packing
from jobs.submission.words import command_words
command = command_words(["index", "--store", "s3://bucket/vectors"], config=None)
packing.pack(command, pathlib.Path("packed"))
print(packing.__file__)
"""


def test_an_installed_clipmill_travels_without_the_files_of_a_checkout(tmp_path: Path):
    pack(command_words(SNAPSHOTLESS, config=None), tmp_path)
    (tmp_path / "other_package").mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "packed").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED],
        cwd=tmp_path,
        env={name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH"}},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    packed = tmp_path / "packed"
    assert {path.name for path in packed.iterdir()} == {"engine", "pipelines", "jobs", "submitted"}
    assert (packed / "pipelines" / "schema.py").is_file()


def test_more_than_the_bound_is_an_error_that_names_the_largest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = tmp_path / "asked.txt"
    asked.write_bytes(b"x" * 3_000_000)
    command = command_words((*SNAPSHOTLESS, "--queries", str(asked)), config=None)
    (tmp_path / "fits").mkdir()
    pack(command, tmp_path / "fits")
    monkeypatch.setattr(packing, "MAX_PACKAGE_BYTES", 3_500_000)
    (tmp_path / "not").mkdir()
    with pytest.raises(ClipmillError, match=r"submitted/queries/asked.txt 3,000,000") as raised:
        pack(command, tmp_path / "not")
    assert "more than 3,500,000" in str(raised.value)
