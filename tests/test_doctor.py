"""Tests of jobs/doctor.py: what a person sees, on a machine that is made up and on this one."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs import doctor
from jobs.checks import examination, report
from jobs.checks.check import Check, urgency
from tests.commands import Done, command

OK = Check(name="python", verdict="ok", found="3.12.1", is_needed=True)
SLOW = Check(name="shared memory", verdict="wrong", found="0.1 GiB free", mend="docker run ...")
BUSY = Check(name="node gpu-1", verdict="unseen", found="in use", mend="look again")
STOPS = Check(name="store", verdict="wrong", found="closed", mend="open it", is_needed=True)
ROOT = Path(__file__).resolve().parent.parent


def clipmill_doctor(*words: object) -> Done:
    return command(doctor.main, [str(word) for word in words])


def test_what_stops_comes_first_and_then_what_is_not_ok():
    assert sorted([OK, SLOW, STOPS], key=urgency) == [STOPS, SLOW, OK]
    assert [check.stops for check in (OK, SLOW, STOPS)] == [False, False, True]


def test_the_report_for_a_terminal(capsys):
    assert report.show([OK, SLOW, STOPS], as_json=False) == 1
    assert capsys.readouterr().out.splitlines() == [
        "wrong    store            closed",
        "                          -> open it",
        "wrong    shared memory    0.1 GiB free",
        "                          -> docker run ...",
        "ok       python           3.12.1",
        "`clipmill embed` would not run here: store",
    ]
    assert report.show([OK, SLOW], as_json=False) == 0
    assert capsys.readouterr().out.endswith("`clipmill embed` would run here\n")
    assert report.show([STOPS, BUSY], as_json=False) == 1
    out = capsys.readouterr().out
    assert "unseen   node gpu-1       in use\n" in out
    assert out.endswith("would not run here: store\n")


def test_what_was_not_looked_at_is_said_beside_the_verdict(capsys):
    assert report.show([OK, BUSY], as_json=False) == 0
    assert capsys.readouterr().out.endswith(
        "`clipmill embed` would run here, as far as could be seen; not looked at: node gpu-1\n"
    )


def test_missing_packages_are_found_without_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "requirements", lambda: ["numpy>=2", "no-such-package>=3"])
    done = clipmill_doctor("--json")
    assert done.code == 1
    assert done.json["checks"] == [
        {
            "name": "packages",
            "verdict": "missing",
            "found": "no-such-package",
            "mend": "pip install -c constraints.txt 'no-such-package>=3'",
            "is_needed": True,
        }
    ]
    assert done.json["runs"] is False


def test_before_it_knows_what_is_missing_it_imports_nothing_that_may_be():
    script = "import sys, jobs.cli, jobs.doctor; print(*sorted(sys.modules))"
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); {script}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "jobs.doctor" in done.stdout.split()


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = clipmill_doctor("--json", "--store", tmp_path / "store", "--engines", tmp_path / "none")
    found = {check["name"]: check for check in done.json["checks"]}
    assert (done.code, done.json["runs"]) == (0, True)
    assert {"python", "packages", "tested versions", "memory", "disk", "gpu"} <= set(found)
    assert {"backends", "ray", "engines", "store"} <= set(found)
    assert found["store"]["verdict"] == "ok"
    assert not (tmp_path / "store").exists()
    shown = clipmill_doctor("--engines", tmp_path / "none").out
    assert shown.endswith("`clipmill embed` would run here\n")


def test_a_store_that_cannot_be_written_stops(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    done = clipmill_doctor("--store", tmp_path / "file" / "store", "--engines", tmp_path / "none")
    assert done.code == 1
    assert done.out.startswith("wrong    store ")
    assert done.out.endswith("`clipmill embed` would not run here: store\n")


def test_an_unknown_option_is_a_usage_error():
    assert clipmill_doctor("--stroe", "x").code == 2


def test_options_reach_the_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []
    monkeypatch.setattr(examination, "ray_checks", lambda address: asked.append(address) or [])
    monkeypatch.setattr(examination, "node_checks", lambda: pytest.fail("of the cluster's nodes"))
    words = ["--address", "head:6379", "--catalog", tmp_path / "none", "--engines", tmp_path / "e"]
    done = clipmill_doctor(*words)
    assert asked == ["head:6379"]
    assert (done.code, "no .parquet file there" in done.out) == (1, True)
