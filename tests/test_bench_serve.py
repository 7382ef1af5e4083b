"""`clipmill bench serve`: a real service under a short load, and while a snapshot follows."""

import json
from pathlib import Path

import pytest

from jobs.bench import main


def test_a_service_is_measured_alone_and_through_snapshots(
    engines_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rows", "500", "--engines", str(engines_dir), "--json"]
    words += ["--clients", "2", "--seconds", "1", "--runs", "1", "--switches", "2"]
    assert main(["serve", *words]) == 0
    alone, switched = json.loads(capsys.readouterr().out)
    assert (alone["name"], switched["name"]) == ("run 1 of 1", "2 snapshots")
    assert alone["num_snapshots"] == 1
    assert 2 <= switched["num_snapshots"] <= 3
    for run in (alone, switched):
        assert run["num_errors"] == 0
        assert run["num_requests"] > 1
        assert 0 < run["p50_ms"] <= run["p99_ms"] < 60_000
        assert run["requests_per_second"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--clients", "0"], "num_clients=0: expected at least 1"),
        (["--clients", "1001"], "num_clients=1001: expected at most 1000"),
        (["--rows", "0"], "num_rows=0: expected at least 20"),
        (["--seconds", "0"], "seconds=0.0: expected more than 0"),
        (["--switches", "-1"], "num_switches=-1: expected 0 or more"),
    ],
)
def test_out_of_bounds(words: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        main(["serve", *words])
