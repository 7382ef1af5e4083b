"""`clipmill bench index`: the store that it makes, what it measures, and autofaiss beside it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.bench import main
from jobs.benches.vector_stores import NUM_FILES

NUM_ROWS = 1_000
AUTOFAISS = '''
"""Stands for autofaiss, with an index that misses what lies in the last file."""

from pathlib import Path

import faiss
import numpy as np

import here


def build_index(folder, *, save_on_disk, max_index_memory_usage, metric_type, **options):
    assert not save_on_disk
    assert metric_type == "ip"
    parts = [np.load(path) for path in sorted(Path(folder).glob("*.npy"))]
    index = faiss.IndexFlatIP(parts[0].shape[1])
    for part in parts[: len(parts) - here.NUM_MISSING]:
        index.add(part)
    return index, {"index_key": f"Flat of {max_index_memory_usage}"}


def tune_index(index, index_key, *, max_index_query_time_ms, save_on_disk, **options):
    assert not save_on_disk
'''


def python_with_autofaiss(folder: Path, *, num_missing: int) -> Path:
    (folder / "autofaiss.py").write_text(AUTOFAISS)
    (folder / "here.py").write_text(f"NUM_MISSING = {num_missing}\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["index", "--rows", str(NUM_ROWS), "--dim", "16", "--json", *words]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_an_index_is_measured_when_built_and_when_changed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    factory = "IVF16,RaBitQ4,Refine(SQfp16)"
    first, changed = measured(capsys, "--factory", factory, "--changed", "0.04")
    assert (first["name"], changed["name"]) == ("first", "4% changed")
    assert changed["factory"] == factory
    # Half of 40 rows have another vector, a quarter went, and a quarter is new.
    assert "with 30 rows that came or changed, and without 10 that went" in changed["reason"]
    for run in (first, changed):
        assert run["seconds"] > 0
        assert run["peak_memory_bytes"] > 50 * 2**20
        chosen = [entry for entry in run["measured"] if entry["setting"] == run["setting"]]
        assert sorted(entry["kind"] for entry in chosen) == ["image", "text"]
        assert all(entry["recall"] >= 0.95 for entry in chosen)


@pytest.mark.parametrize(("num_missing", "low", "high"), [(0, 0.999, 1.0), (1, 0.85, 0.995)])
def test_autofaiss_is_asked_the_same(
    num_missing: int, low: float, high: float, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    python = python_with_autofaiss(tmp_path, num_missing=num_missing)
    _, theirs, _ = measured(capsys, "--autofaiss", str(python), "--max-memory-bytes", "123456789")
    assert (theirs["name"], theirs["factory"]) == ("autofaiss, build alone", "Flat of 123456789B")
    assert {entry["kind"] for entry in theirs["measured"]} == {"image", "text"}
    # One of 20 files is missing, and with it one answer in 20.
    for entry in theirs["measured"]:
        assert low <= entry["recall"] <= high
    assert all(entry["search_seconds"] > 0 for entry in theirs["measured"])


def test_the_table_marks_the_setting_of_searches(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert main(["index", "--rows", str(NUM_ROWS), "--dim", "16", "--page", str(page)]) == 0
    assert "1,000 x 16" in page.read_text()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("first: ")
    assert [line.split()[:2] for line in lines if line.startswith("*")] == [
        ["*", "0"],
        ["*", "0"],
    ] * 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rows", "19"], f"num_rows=19: expected at least {NUM_FILES}"),
        (
            ["--rows", "1000", "--changed", "0.08"],
            "60 rows would change or go, expected at most 50",
        ),
        (["--rows", "21"], "3 rows would change or go, expected at most 1"),
        (["--changed", "1"], "changed_share=1.0: expected between 0 and 1"),
    ],
)
def test_out_of_bounds(words: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        main(["index", *words])
