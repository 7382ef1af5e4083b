"""What all commands share: options from flags and YAML, exit codes, results on stdout.

Knows nothing of what a command does.

Exit codes: 0 done, 1 environment or data (with the way out), 2 usage.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from engine.errors import ClipmillError
from engine.process_redaction import redact_process
from engine.redaction import redacted
from jobs.stopping import Terminated
from pipelines.errors import QueryError
from pipelines.json_text import json_text

Main = Callable[[Sequence[str] | None], int]
# What Ray raises once processes or nodes of the cluster are gone, more often than it tries again.
_LOSSES = (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
Actions = Mapping[str, tuple[Callable[[Sequence[str]], int], str]]


class CommandParser(argparse.ArgumentParser):
    """An argparse parser whose options can also come from a YAML file; flags win."""

    def __init__(self, name: str, *, description: str) -> None:
        """Begin with the options that every command has."""
        super().__init__(
            prog=f"clipmill {name}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.for_once: set[str] = set()
        """Options of the command line alone: a file would say them every time."""
        self.add_argument("--config", metavar="FILE", help="YAML file of options; flags win")
        self.add_argument(
            "--json", action="store_true", help="print the result as one JSON object on stdout"
        )

    def parse_options(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse flags over YAML over defaults; exits with 2 on unknown or missing options."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        named = finder.parse_known_args(argv)[0].config
        if named:
            self._take_defaults(Path(named), argv=sys.argv[1:] if argv is None else argv)
        return self.parse_args(argv)

    def error(self, message: str) -> NoReturn:
        """Exit with 2; what was misspelt may hold a password."""
        super().error(redacted(message))

    def _take_defaults(self, path: Path, *, argv: Sequence[str]) -> None:
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"--config {path}: {error}")
        if not isinstance(values, dict):
            self.error(f"--config {path}: expected a mapping of options to values")
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        for name, value in values.items():
            dest = str(name).replace("-", "_")
            if dest not in actions or dest == "config":
                known = ", ".join(sorted(actions.keys() - {"config"}))
                self.error(f"--config {path}: no option {name!r} (options: {known})")
            action = actions[dest]
            if dest in self.for_once:
                self.error(
                    f"--config {path}: {name} is for this time, and a file would say it every "
                    f"time; say {action.option_strings[-1]} on the command line"
                )
            if self._is_overruled(action, argv):
                continue
            takes_list = action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction)
            if takes_list != isinstance(value, list):
                expected = "a list" if takes_list else "one value"
                self.error(f"--config {path}: {name}: expected {expected}, found {value!r}")
            if isinstance(value, list):
                value = [self._typed(action, entry, path=path) for entry in value]
            elif not isinstance(action, argparse._StoreTrueAction):
                value = self._typed(action, value, path=path)
            elif not isinstance(value, bool):
                self.error(f"--config {path}: {name}: expected true or false, found {value!r}")
            action.default, action.required = value, False
            for group in self._mutually_exclusive_groups:
                if action in group._group_actions:
                    group.required = False

    def _is_overruled(self, action: argparse.Action, argv: Sequence[str]) -> bool:
        """Whether a flag says otherwise: of options that exclude each other, the flag's counts.

        Also of one that may be said several times, which argparse would add to the file's.
        """
        given = {word.split("=", 1)[0] for word in argv}
        if isinstance(action, argparse._AppendAction) and given & set(action.option_strings):
            return True
        return any(
            given & set(other.option_strings)
            for group in self._mutually_exclusive_groups
            if action in group._group_actions
            for other in group._group_actions
        )

    def _typed(self, action: argparse.Action, value: Any, *, path: Path) -> Any:
        if value is None:
            return None
        try:
            typed = self._get_value(action, str(value))
            self._check_value(action, typed)
        except argparse.ArgumentError as error:
            self.error(f"--config {path}: {error}")
        return typed


def dispatch(command: str, actions: Actions, argv: Sequence[str] | None) -> int:
    """Run the action of a command that the first word names; returns its exit code.

    Args:
        command: Its name.
        actions: Their names -> what runs them, and a line of what they do.
        argv: The action and its options; None takes those of the process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    lines = [f"  {name:<10} {what}" for name, (_, what) in actions.items()]
    head = f"usage: clipmill {command} ACTION [options]   (clipmill {command} ACTION --help)"
    usage = "\n".join([head, "", *lines])
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        return 0
    if words[0] not in actions:
        print(f"clipmill {command}: no action {words[0]!r}\n\n{usage}", file=sys.stderr)
        return 2
    action, _ = actions[words[0]]
    return action(words[1:])


def run(main: Main, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; errors meant for people are printed as one text."""
    redact_process()
    try:
        code = main(argv)
    except KeyboardInterrupt as error:
        # As a shell counts: 128 and the number of the signal.
        code = 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
        _fail("stopped; run the same command again to go on", code=code)
    except RayTaskError as error:
        if isinstance(error.cause, _LOSSES):
            code = _fail(_lost(error.cause), code=1)
        elif isinstance(error.cause, ClipmillError):
            code = _fail(str(error.cause), code=1)
        else:
            raise
    except _LOSSES as error:
        code = _fail(_lost(error), code=1)
    except ClipmillError as error:
        code = _fail(str(error), code=1)
    except ValueError as error:
        # Libraries derive their own errors from it; those are no fault of the user.
        if type(error) is not ValueError and not _is_for_people(error):
            raise
        code = _fail(str(error), code=2)
    sys.exit(code)


def print_result(result: Any, *, as_json: bool, text: str) -> None:
    """Print a dataclass (or list of them) as JSON, or the text."""
    print(json_text(result) if as_json else text)


def say(*lines: str) -> None:
    """Print on stderr, at once: what takes long and ends early has then said what it had."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


def _is_for_people(error: ValueError) -> bool:
    # Not imported before: a client that only submits has no Pillow.
    from engine.images import ImageRejected

    return isinstance(error, ImageRejected | QueryError)


def _lost(error: RayError) -> str:
    what = str(error).strip().splitlines()[0]
    return f"the cluster lost a worker or a node ({what}); run the same command again to go on"


def _fail(text: str, *, code: int) -> int:
    print(f"clipmill: {redacted(text)}", file=sys.stderr)
    return code
