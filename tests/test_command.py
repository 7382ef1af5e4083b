"""What all commands share: options from YAML, exit codes, JSON on stdout."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, WorkerCrashedError

from engine.errors import CheckpointError
from jobs.command import CommandParser, print_result, run


def parser() -> CommandParser:
    made = CommandParser("sample", description="For the tests.")
    made.add_argument("--store", required=True)
    made.add_argument("--rows-per-file", type=int, default=7)
    made.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    made.add_argument("--carry", nargs="*", default=[])
    return made


LOST = "clipmill: the cluster lost a worker or a node ({}); run the same command again to go on\n"


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path):
    file = tmp_path / "night.yaml"
    file.write_text("store: s3://bucket/a\nrows-per-file: 11\ncarry: [price, brand]\njson: true\n")
    options = parser().parse_options(["--config", str(file), "--dtype", "float16"])
    assert (options.store, options.rows_per_file, options.dtype) == ("s3://bucket/a", 11, "float16")
    assert options.carry == ["price", "brand"]
    assert options.json is True
    options = parser().parse_options(["--config", str(file), "--store", "b", "--carry", "size"])
    assert (options.store, options.carry) == ("b", ["size"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stor: a\n", "no option 'stor' (options: carry, dtype, json, rows_per_file, store)"),
        ("rows_per_file: many\n", "invalid int value: 'many'"),
        ("dtype: int8\n", "invalid choice: 'int8'"),
        ("- a\n- b\n", "expected a mapping"),
        ("store: [unclosed\n", "night.yaml"),
        ("store: [a]\n", "store: expected one value, found ['a']"),
        ("carry: price\n", "carry: expected a list, found 'price'"),
        ("json: maybe\n", "json: expected true or false, found 'maybe'"),
    ],
)
def test_faulty_yaml_is_a_usage_error(tmp_path: Path, capsys, content: str, message: str):
    file = tmp_path / "night.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        parser().parse_options(["--config", str(file), "--store", "a"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_for_this_time_is_refused_in_a_file(tmp_path: Path, capsys):
    file = tmp_path / "night.yaml"
    file.write_text("carry: [price]\n")
    made = parser()
    made.for_once.add("carry")
    with pytest.raises(SystemExit) as stopped:
        made.parse_options(["--config", str(file), "--store", "a"])
    assert stopped.value.code == 2
    assert "carry is for this time, and a file would say it every time" in capsys.readouterr().err
    assert made.parse_options(["--store", "a", "--carry", "price"]).carry == ["price"]


def test_of_options_that_exclude_each_other_the_flag_counts(tmp_path: Path):
    def parse(*argv: str) -> tuple[str | None, str | None]:
        made = CommandParser("sample", description="For the tests.")
        asked = made.add_mutually_exclusive_group(required=True)
        asked.add_argument("--text")
        asked.add_argument("--image")
        options = made.parse_options(argv)
        return options.text, options.image

    file = tmp_path / "query.yaml"
    file.write_text("text: a red bicycle\n")
    assert parse("--config", str(file)) == ("a red bicycle", None)
    assert parse("--config", str(file), "--image=a.jpg") == (None, "a.jpg")


def test_a_missing_option_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_options([])
    assert stopped.value.code == 2
    assert "--store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (CheckpointError("no such folder"), 1, "clipmill: no such folder\n"),
        (ValueError("rows=0: expected at least 1"), 2, "clipmill: rows=0: expected at least 1\n"),
        (
            RayTaskError("read", "Traceback of a worker", CheckpointError("gone")),
            1,
            "clipmill: gone\n",
        ),
        (WorkerCrashedError(), 1, LOST.format(WorkerCrashedError())),
        (
            RayTaskError("write", "trace", WorkerCrashedError()),
            1,
            LOST.format(WorkerCrashedError()),
        ),
        (ActorDiedError(), 1, LOST.format(ActorDiedError())),
        (KeyboardInterrupt(), 130, "clipmill: stopped; run the same command again to go on\n"),
    ],
)
def test_errors_meant_for_people_become_one_text_and_an_exit_code(capsys, error, code, text):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == code
    assert capsys.readouterr().err == text


def test_a_bug_keeps_its_traceback():
    def main(_):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run(main)
    with pytest.raises(UnicodeDecodeError):
        run(lambda _: int(b"\xff".decode()))
    with pytest.raises(RayTaskError):
        run(lambda _: (_ for _ in ()).throw(RayTaskError("read", "trace", KeyError("a bug"))))


@dataclass(frozen=True)
class Answer:
    key: str
    score: float


def test_results_are_json_or_text(capsys):
    print_result([Answer("a", 0.5)], as_json=True, text="unused")
    assert json.loads(capsys.readouterr().out) == [{"key": "a", "score": 0.5}]
    print_result(Answer("a", float("nan")), as_json=True, text="unused")
    assert capsys.readouterr().out == '{"key": "a", "score": null}\n'
    print_result([Answer("a", 0.5)], as_json=False, text="one answer")
    assert capsys.readouterr().out == "one answer\n"


def test_numbers_that_json_does_not_have_are_null(capsys):
    lost = [Answer("a", float("nan")), {"best": float("inf"), "all": (1.5, float("-inf"))}]
    print_result(lost, as_json=True, text="unused")
    assert capsys.readouterr().out == (
        '[{"key": "a", "score": null}, {"best": null, "all": [1.5, null]}]\n'
    )
