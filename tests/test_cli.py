"""The command line as a person meets it: `clipmill COMMAND` and `python -m jobs.COMMAND`."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench import BENCHES
from jobs.cli import COMMANDS, main
from jobs.engine import ACTIONS
from jobs.runs import ACTIONS as RUN_ACTIONS
from jobs.snapshots import ACTIONS as SNAPSHOT_ACTIONS
from jobs.submitted import ACTIONS as JOBS_ACTIONS

ROOT = Path(__file__).resolve().parent.parent


def test_no_command_and_help_list_the_commands(capsys):
    assert main([]) == 0
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_an_unknown_command_is_a_usage_error(capsys):
    assert main(["embedd"]) == 2
    assert "no command 'embedd'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        *sorted(COMMANDS.keys() - {"bench", "engine", "jobs", "runs", "snapshots"}),
        *(f"bench {action}" for action in BENCHES),
        *(f"engine {action}" for action in ACTIONS),
        *(f"runs {action}" for action in RUN_ACTIONS),
        *(f"snapshots {action}" for action in SNAPSHOT_ACTIONS),
        *(f"jobs {action}" for action in JOBS_ACTIONS),
    ],
)
def test_every_command_explains_its_options(name: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: clipmill {name}" in shown
    assert "--config" in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["embed", "--store", "s", "--checkpoint", "c"], 2, "--catalog"),
        (
            ["index", "--store", "/proc/nowhere"],
            1,
            "has no snapshot; run `clipmill embed` first",
        ),
    ],
)
def test_python_m_gives_the_same_exit_codes(words: list[str], code: int, message: str):
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{words[0]}", *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
