"""What travels with a submitted command: the packages, its words, the files that they name.

Knows nothing of servers. The folder becomes Ray's working_dir, in which the job starts.
"""

import json
import shutil
from pathlib import Path

import yaml

from engine.errors import ClipmillError
from jobs.submission.words import CommandWords

PACKAGES = ("engine", "pipelines", "jobs")
MAX_PACKAGE_BYTES = 20 * 2**20
"""Of all that travels; the packages are 2 MB. Ray keeps it in the memory of its head."""
WORDS_PATH = Path("submitted") / "words.json"
"""Of the command's words within the folder. They are in a file since what is said to Ray can be
read on its dashboard."""

# Of a checkout; an installed clipmill has none.
_PROJECT_FILES = ("pyproject.toml", "constraints.txt")
# What no submitted command imports, with megabytes of weights and plots.
_LEFT_OUT = ("jobs/demo", "jobs/benches", "jobs/deploy")
# Options that name files of this machine.
_FILES = ("queries",)


def pack(command: CommandWords, folder: Path) -> None:
    """Fill an empty folder; ClipmillError if that is more than `MAX_PACKAGE_BYTES`."""
    root = Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        _copy_package(root, package, folder=folder)
    for name in _PROJECT_FILES:
        if (root / name).is_file():
            shutil.copyfile(root / name, folder / name)
    words_path = folder / WORDS_PATH
    words_path.parent.mkdir()
    words = [command.command, *command.words]
    if command.config_path is not None:
        config_path = words_path.parent / command.config_path.name
        config_path.write_text(yaml.safe_dump(dict(command.config)), encoding="utf-8")
        words += ["--config", str(config_path.relative_to(folder))]
    for option in _FILES:
        named = command.value(option)
        if named is not None:
            # The last of two flags counts.
            words += [f"--{option}", _take_file(Path(named), option=option, folder=folder)]
    words_path.write_text(json.dumps(words), encoding="utf-8")
    _check_size(folder)


def _copy_package(root: Path, package: str, *, folder: Path) -> None:
    def left_out(directory: str, names: list[str]) -> set[str]:
        within = Path(directory).relative_to(root)
        return {
            name
            for name in names
            if name == "__pycache__"
            or name.startswith(".")
            or (within / name).as_posix() in _LEFT_OUT
        }

    shutil.copytree(root / package, folder / package, ignore=left_out)


def _take_file(path: Path, *, option: str, folder: Path) -> str:
    taken = WORDS_PATH.parent / option / path.name
    (folder / taken).parent.mkdir()
    try:
        shutil.copyfile(path, folder / taken)
    except OSError as error:
        raise ValueError(f"--{option} {path}: {error}") from error
    return str(taken)


def _check_size(folder: Path) -> None:
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if sum(sizes.values()) <= MAX_PACKAGE_BYTES:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    named = ", ".join(f"{path.relative_to(folder)} {sizes[path]:,}" for path in largest)
    raise ClipmillError(
        f"what would travel to the cluster is {sum(sizes.values()):,} bytes, more than "
        f"{MAX_PACKAGE_BYTES:,}; remove what is no part of the code, the largest are: {named}"
    )
