"""What a submitted command says of itself: its options, by flags over its YAML file.

Knows nothing of what the options mean to the command.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.redaction import without_secrets

SUBMITTABLE = ("nightly", "embed", "index", "engine")
"""Commands that have work for a cluster; the others run where they are called."""

# Where a command reads and writes. Relative, they would be in a folder that goes with the job.
_PLACES = ("catalog", "store", "engines", "calibrate")
# Names on the hub look like relative folders: only those that are there are refused.
_PLACES_OR_NAMES = ("checkpoint",)
# Files that a command writes for the person who runs it.
_WRITTEN = ("page",)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandWords:
    """A command that is to be submitted."""

    command: str
    """One of `SUBMITTABLE`."""
    words: tuple[str, ...]
    """After it, without --config."""
    config_path: Path | None = None
    """Of --config, on this machine."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What that file says; `address` is left out, which is for this machine."""

    def __post_init__(self) -> None:
        """Refuse what can't be done on another machine."""
        if self.command not in SUBMITTABLE:
            raise ValueError(
                f"command: {self.command!r} is none of those that have work for a cluster "
                f"({', '.join(SUBMITTABLE)}); run `clipmill {self.command}` without submit"
            )
        for name in (*_PLACES, *_PLACES_OR_NAMES):
            place = self.value(name)
            if place is None or "://" in place or Path(place).is_absolute():
                continue
            if name in _PLACES or Path(place).exists():
                raise ValueError(
                    f"--{name} {place}: relative to a folder of this machine, which the cluster's "
                    "nodes have not; name a URI, or a path from / on that all nodes share"
                )
        for name in _WRITTEN:
            if self.value(name) is not None:
                raise ValueError(
                    f"--{name}: would be written on the cluster; leave it out, and run `clipmill "
                    f"{self.command} --{name} FILE` here afterwards"
                )

    def value(self, name: str) -> str | None:
        """Of an option, in the flags or else in the file; None if neither says it."""
        flag, found = f"--{name}", None
        for number, word in enumerate(self.words):
            if word == flag and number + 1 < len(self.words):
                found = self.words[number + 1]
            elif word.startswith(f"{flag}="):
                found = word.removeprefix(f"{flag}=")
        if found is None:
            said = self.config.get(name, self.config.get(name.replace("-", "_")))
            found = None if said is None else str(said)
        return found

    @property
    def shown(self) -> str:
        """The command line for people, without secrets."""
        config = () if self.config_path is None else ("--config", str(self.config_path))
        return " ".join(without_secrets(("clipmill", self.command, *self.words, *config)))


def read_config(path: Path) -> dict[str, Any]:
    """What a --config file says; ValueError if it can't be read or is no mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected a mapping of options to values")
    return {str(name): value for name, value in values.items()}


def command_words(words: Sequence[str], *, config: Path | None) -> CommandWords:
    """A command, of its words.

    Args:
        words: The command and its options.
        config: Its --config file.
    """
    if not words or words[0].startswith("-"):
        raise ValueError(
            f"command: say which before its options: clipmill submit {SUBMITTABLE[0]} ..."
        )
    values = {} if config is None else read_config(config)
    return CommandWords(
        command=words[0],
        words=tuple(words[1:]),
        config_path=config,
        config={name: value for name, value in values.items() if name != "address"},
    )
