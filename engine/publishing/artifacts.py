"""Folders of files with their checksums in one JSON: built aside, checked, put in place whole.

Knows nothing of what the files are, nor of other nodes.

    DIRECTORY/
      fp8-0011223344556677/             an engine: its files, `manifest.json` lists them
        plans/PLAN/                     a plan of it: its files, `plan.json` lists them
      .building/fp8-0011223344556677/   a lock, and what is being built or removed
"""

import errno
import fcntl
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO

from engine.errors import DamagedError, EngineError
from engine.manifest import verify_files

BUILDING_DIR = ".building"
_LOCK_FILE = "lock"
_log = logging.getLogger(__name__)


def listed_files(content: bytes, path: str) -> Mapping[str, str]:
    """The `files` (name -> SHA-256) of a JSON object; DamagedError names `path`."""
    try:
        files = json.loads(content)["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path}: damaged ({error})") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """The name of an engine or of a plan. It is there once its record is, and whole."""

    path: str
    """Of its folder, relative to where engines are kept."""
    record: str
    """The file that lists the others, written last."""
    files_in: Callable[[bytes, str], Mapping[str, str]] = listed_files
    """Content and path of the record -> name of each file and its SHA-256; DamagedError."""

    def files(self, content: bytes, *, path: str) -> Mapping[str, str]:
        """Name of each file (folders with `/`) and its SHA-256; DamagedError if malformed."""
        files = self.files_in(content, path)
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise DamagedError(f"{path}: damaged (a file named {name!r})")
        return files

    def verify(self, directory: Path) -> None:
        """Check a folder of it; DamagedError names the first file that is missing or differs."""
        path = directory / self.record
        if not path.exists():
            raise DamagedError(f"{path} is missing")
        verify_files(self.files(path.read_bytes(), path=str(path)), directory=directory)


class LocalArtifacts:
    """The artifacts in a folder of this node."""

    def __init__(self, directory: Path, *, way_out: str) -> None:
        """Nothing is read or written yet.

        Args:
            directory: Where they lie; made when the first is built.
            way_out: What to do where it cannot be written, for messages.
        """
        self.directory = directory
        self._way_out = way_out

    def find(self, artifact: Artifact) -> Path | None:
        """The folder of a whole artifact; None if it is not there, or damaged, which is logged."""
        directory = self.directory / artifact.path
        with self._errors("read"):
            try:
                if (directory / artifact.record).exists():
                    artifact.verify(directory)
                    return directory
            except DamagedError as error:
                _log.warning("%s is damaged and not used: %s", artifact.path, error)
            except FileNotFoundError:
                _log.debug("%s was removed while it was read", artifact.path)
        return None

    @contextmanager
    def lock(self, artifact: Artifact) -> Iterator[None]:
        """Hold what all who build or fetch an artifact on this node hold, one after another.

        The operating system drops an flock with its process, so a killed builder holds nobody up.
        """
        with self._lock_file(self._workspace(artifact.path)) as handle:
            with self._errors("locked"):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def building(self, artifact: Artifact) -> Iterator[Path]:
        """An empty folder to fill, gone at the end unless it was published. Under the lock only."""
        workspace = self._workspace(artifact.path)
        for leftover in _folders_in(workspace):  # of a killed builder
            shutil.rmtree(leftover, ignore_errors=True)  # another user's may stay; it harms nobody
        with self._errors("written"):
            building = Path(tempfile.mkdtemp(dir=workspace))
        try:
            yield building
        finally:
            if building.exists():
                shutil.rmtree(building)

    def fill(self, building: Path, artifact: Artifact, *, write: Callable[[Path], object]) -> None:
        """Have an empty folder filled, and check what was written.

        Raises:
            DamagedError: A file is missing or does not match its checksum.
            EngineError: A file cannot be read or written.
        """
        try:
            write(building)
        except OSError as error:
            raise EngineError(
                f"{artifact.path}: a file cannot be read or written ({error}); {self._way_out}"
            ) from error
        artifact.verify(building)

    def publish(self, artifact: Artifact, building: Path) -> Path:
        """Put a built folder in place by one rename; returns where the artifact now lies.

        What lies there already stays if it is whole: of two builders the first one's counts.
        """
        directory = self.directory / artifact.path
        with self._errors("written"):
            building.chmod(0o755)  # mkdtemp makes it private; other users' actors may share it
            directory.parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    building.rename(directory)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    if self.find(artifact) is None:
                        self.retire(artifact.path)
                        continue
                return directory

    def retire(self, path: str) -> None:
        """Remove a folder such that nobody ever sees half of it."""
        workspace = self._workspace(path)
        with self._errors("written"):
            workspace.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=workspace))
            (self.directory / path).rename(aside / "retired")
        # Network file systems keep what somebody has open; the next builder removes that.
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def idle(self, path: str) -> Iterator[bool]:
        """Whether nobody builds at a path or under it; if so, none who has built there begins."""
        own = self._workspace(path)
        under = [
            workspace
            for workspace in _folders_in(self.directory / BUILDING_DIR)
            if workspace.name.startswith(f"{own.name}+")
        ]
        with ExitStack() as stack:
            for workspace in (own, *under):
                handle = stack.enter_context(self._lock_file(workspace))
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                    return
            yield True

    def leftovers(self) -> dict[Path, str]:
        """Folders that builders have not finished yet or never will -> path of the artifact."""
        return {
            leftover: workspace.name.replace("+", "/")
            for workspace in _folders_in(self.directory / BUILDING_DIR)
            for leftover in _folders_in(workspace)
        }

    def folders(self, path: str) -> list[str]:
        """Names of the folders at a path (`""`: here), hidden ones left out."""
        found = _folders_in(self.directory / path)
        return [folder.name for folder in found if not folder.name.startswith(".")]

    def _lock_file(self, workspace: Path) -> TextIO:
        with self._errors("written"):
            workspace.mkdir(parents=True, exist_ok=True)
            return (workspace / _LOCK_FILE).open("w")

    def _workspace(self, path: str) -> Path:
        return self.directory / BUILDING_DIR / path.replace("/", "+")

    @contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EngineError(
                f"engines folder {self.directory} cannot be {verb} ({error.strerror}); "
                f"{self._way_out}"
            ) from error


def _folders_in(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir())
