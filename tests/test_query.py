"""`clipmill query` as a person or a script calls it."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.query import main
from pipelines.indexes.filters import parse_condition
from pipelines.indexes.queries import Part, Query, query_from_json
from pipelines.json_text import json_text
from pipelines.search import Searcher
from tests.catalogs import scene_rows, stored_embeddings
from tests.commands import command

ROWS = scene_rows(60)


@pytest.fixture(scope="module")
def common(carried_store: Path, engines_dir: Path) -> list[str]:
    return ["--store", str(carried_store), "--engines", str(engines_dir)]


@pytest.fixture(scope="module")
def searcher(carried_store: Path, engines_dir: Path) -> Searcher:
    return Searcher(str(carried_store), engines_uri=str(engines_dir))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(ROWS[11]["image"])
    return path


def test_text_and_image_give_keys_scores_and_columns(common: list[str], picture: Path, capsys):
    assert main([*common, "--image", str(picture), "-k", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (set(answer), answer["snapshot"]) == ({"hits", "notes", "snapshot"}, 1)
    assert [set(hit) for hit in answer["hits"]] == [{"key", "score", "columns"}] * 2
    assert answer["hits"][0]["key"] == ROWS[11]["key"]
    assert main([*common, "--text", ROWS[11]["text"], "-k", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.split()[1].startswith("k") for line in lines)
    assert all("  price=" in line and "  tags=" in line for line in lines)


def test_the_command_line_json_and_python_agree(
    common: list[str],
    searcher: Searcher,
    carried_store: Path,
    picture: Path,
    tmp_path: Path,
    capsys,
):
    vector = stored_embeddings(carried_store, modality="image")["k0031"]
    np.save(tmp_path / "vector.npy", vector[None])
    options = ["--text", "a red ring^0.5", "--weight", "2", "--image", str(picture)]
    options += ["--not-key", "k0003", "--weight", "0.25", "--key", "k0005", "--weight", "1e-1"]
    options += ["--vector", str(tmp_path / "vector.npy"), "--not-text=--weight"]
    options += ["--where", "brand=acme|bolt", "--where", "price<50", "-k", "7"]
    assert main([*common, *options, "--json"]) == 0
    by_command = json.loads(capsys.readouterr().out)
    query = Query(
        parts=(
            Part(text="a red ring^0.5", weight=2),
            Part(image=ROWS[11]["image"]),
            Part(key="k0003", weight=-0.25),
            Part(key="k0005", weight=0.1),
            Part(vector=tuple(vector.tolist())),
            Part(text="--weight", weight=-1),
        )
    )
    where = [parse_condition("brand=acme|bolt"), parse_condition("price<50")]
    (answer,) = searcher.search([query], num_hits=7, where=where)
    assert json.loads(json_text(answer)) == by_command
    assert len(by_command["hits"]) == 7
    record = {
        "parts": [
            {"text": "a red ring^0.5", "weight": 2},
            {"image": base64.b64encode(ROWS[11]["image"]).decode()},
            {"key": "k0003", "weight": -0.25},
            {"key": "k0005", "weight": 0.1},
            {"vector": vector.tolist()},
            {"text": "--weight", "weight": -1},
        ],
        "where": [
            {"column": "brand", "operator": "in", "value": ["acme", "bolt"]},
            {"column": "price", "operator": "lt", "value": 50},
        ],
    }
    assert query_from_json(record)[0] == query
    lines = tmp_path / "queries.jsonl"
    lines.write_text(f"{json.dumps(record)}\n")
    assert main([*common, "--queries", str(lines), "-k", "7"]) == 0
    assert json.loads(capsys.readouterr().out) == by_command


def test_a_file_of_queries_gives_an_answer_a_line(common: list[str], tmp_path: Path, capsys):
    price = {"column": "price", "operator": "lt", "value": 30}
    asked: list[Any] = [
        {"parts": [{"text": row["text"]}], "where": [price] if number % 3 else []}
        for number, row in enumerate(ROWS)
    ]
    path = tmp_path / "queries.jsonl"
    path.write_text("\n\n".join(map(json.dumps, asked * 5)))
    assert main([*common, "--queries", str(path), "--where", "stock=true", "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 300
    assert lines[:60] == lines[60:120] == lines[240:]
    for number, line in enumerate(lines[:60]):
        numbers = [int(hit["key"][1:]) for hit in json.loads(line)["hits"]]
        assert len(numbers) == 3
        assert all(row % 2 == 0 and (number % 3 == 0 or row < 30) for row in numbers)
    assert main([*common, "--text", ROWS[1]["text"], "--where", "stock=true", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["hits"]
    assert [hit["key"] for hit in alone if int(hit["key"][1:]) < 30][:3] == [
        hit["key"] for hit in json.loads(lines[1])["hits"]
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"parts": [{"text": "a"}]}\n\n{"parts": []}', "line 3: a query has no parts"),
        ('{"parts": [{"text": "a"}]}\nno JSON', "line 2: Expecting value"),
        ('{"parts": [{"text": "a"}]}\n{"parts": [{"key": "x"}]}', "line 2: no image embedding"),
        ("[" * 100_000, "line 1: maximum recursion|line 1: .*"),
    ],
)
def test_a_bad_line_is_named(common: list[str], tmp_path: Path, lines: str, message: str):
    path = tmp_path / "queries.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=rf"--queries .*queries\.jsonl: ({message})"):
        main([*common, "--queries", str(path)])


def test_a_text_that_is_cut_is_said_on_stderr(common: list[str], capsys):
    assert main([*common, "--text", "a small red circle " * 60]) == 0
    assert "note: text 'a small red circle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "nothing.jpg"], r"--image nothing\.jpg: No such file"),
        (["--not-image", "nothing.jpg"], r"--not-image nothing\.jpg: No such file"),
        (["--vector", "nothing.npy"], r"--vector nothing\.npy: No such file"),
        (["--queries", "nothing.jsonl"], r"--queries nothing\.jsonl: No such file"),
        (["--not-text", "a ring"], "only what to be far from"),
        (["--text", "a ring", "--weight", "0"], "--text --weight 0: expected more than 0"),
        (["--key", "k9999"], "no image embedding of key 'k9999'"),
        (["--text", "a ring", "--where", "colour=red"], "no column 'colour'"),
        (["--text", "a ring", "--where", "brand"], "can't be read; write COLUMN=VALUE"),
    ],
)
def test_what_cannot_be_asked_is_said_and_is_usage(
    common: list[str], options: list[str], message: str
):
    with pytest.raises(ValueError, match=message):
        main([*common, *options])
    assert command(main, [*common, *options]).code == 2


def test_files_that_hold_no_vector(common: list[str], tmp_path: Path):
    path = tmp_path / "vector.npy"
    contents: list[tuple[Any, str]] = [
        (np.zeros((2, 3)), r"holds float64 \[2, 3\]; expected one vector"),
        (np.array(["a"]), "holds <U1"),
        (np.float32(1), r"holds float32 \[\]"),
    ]
    for content, message in contents:
        np.save(path, content)
        with pytest.raises(ValueError, match=message):
            main([*common, "--vector", str(path)])
    for damaged in (b"", b"no array", b"\x93NUMPY"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"vector\.npy: no file of NumPy"):
            main([*common, "--vector", str(path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to look for: --text, --image, --key or --vector, or --queries"),
        (["--text", "a", "--queries", "b"], "say what to look for"),
        (["--weight", "2", "--text", "a"], "--weight 2.0: name it after the one part"),
        (["--text", "a", "--weight", "2", "--weight", "3"], "--weight 3.0: name it after"),
    ],
)
def test_usage(options: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--store", "store", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_conditions_of_a_file_are_overruled_by_flags(common: list[str], tmp_path: Path, capsys):
    path = tmp_path / "query.yaml"
    path.write_text("where: [key=k0001|k0002, stock=true]\nnum-hits: 3\n")
    asked = [*common, "--config", str(path), "--text", "a ring", "--json"]
    assert main(asked) == 0
    assert [hit["key"] for hit in json.loads(capsys.readouterr().out)["hits"]] == ["k0002"]
    assert main([*asked, "--where", "key=k0007"]) == 0
    assert [hit["key"] for hit in json.loads(capsys.readouterr().out)["hits"]] == ["k0007"]
    path.write_text("text: a ring\n")
    with pytest.raises(SystemExit):
        main(asked)
    assert "text is for this time" in capsys.readouterr().err


def test_help_says_how(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert '--where "brand=acme|bolt"' in printed
    assert "--not-vector FILE.npy" in printed
