"""Commands as a person runs them, but in this process: exit code and what was printed."""

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from jobs import engine
from jobs.command import Main, run


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What `--json` printed, by the letter of the standard."""
        return json.loads(self.out, parse_constant=_refuse)


def command(main: Main, words: Sequence[str]) -> Done:
    """Run a command's `main`; a bug is raised as it is."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run(main, words)
        except SystemExit as stopped:
            code = stopped.code
    return Done(code, out.getvalue(), err.getvalue())


def clipmill_engine(*words: object) -> Done:
    """`clipmill engine ...`."""
    return command(engine.main, [str(word) for word in words])


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
