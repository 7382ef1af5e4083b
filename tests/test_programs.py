"""Programs that are watched: what they print is read, and none is left when who watches ends."""

import subprocess
from typing import Any

import pytest

from engine.errors import ClipmillError
from jobs.benches import programs
from jobs.benches.programs import run_watched
from jobs.stopping import Terminated


def test_what_a_program_prints_is_its_report() -> None:
    watched = run_watched(["-c", "import json; print(json.dumps({'rows': 3}))"])
    assert watched.report == {"rows": 3}


def test_a_program_that_fails_is_named() -> None:
    with pytest.raises(ClipmillError, match=r"-c raise SystemExit\(3\) ended with 3"):
        run_watched(["-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_program_ends_with_who_watches(is_deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[Any]] = []

    def interrupted(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        started.append(process)
        raise Terminated

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    monkeypatch.setattr(programs, "STOP_SECONDS", 0.5 if is_deaf else 30.0)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if is_deaf else ""
    code = f"import signal, time; {deaf} print('ready', flush=True); time.sleep(60)"
    with pytest.raises(Terminated):
        run_watched(["-c", code])
    assert started[0].returncode == (-9 if is_deaf else -15)


def test_a_program_that_ctrl_c_came_to_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[Any]] = []

    def interrupted(process: subprocess.Popen[bytes]) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_watched(["-c", "import time; time.sleep(0.5); raise SystemExit(7)"])
    assert started[0].returncode == 7
