"""A folder at any URI: publishes files whole, creates files once, reads, lists and removes.

Knows nothing of what the files hold.
"""

import os
import random
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from fsspec.implementations.local import LocalFileSystem

from engine.errors import ClipmillError
from engine.publishing.file_systems import (
    file_system_errors,
    find_files,
    is_write_conflict,
    open_file_system,
)

# Creating an object that others create at the same moment: the next try mostly finds it there.
NUM_CREATE_TRIES = 8
CREATE_PAUSE_SECONDS = 0.5
REMOVE_THREADS = 16
# When a file was written: of disks (where `created` is something else), of S3, of memory.
TIME_FIELDS = ("mtime", "LastModified", "created")
# Of a URI's path: fsspec removes by pattern, of other folders too, and the names that records have
# for a place (`public_uri`) end at a query.
_REFUSED_CHARS = frozenset("#?*[")


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedFile:
    """A file as a folder lists it."""

    path: str
    """Relative to the `Folder`, like all its paths."""
    num_bytes: int
    """Size."""
    modified_at: datetime
    """By the file system's clock."""


class Folder:
    """A folder at any fsspec URI. Small, and safe to send to workers.

    An object store shows an object when its upload ends; on a disk, files are written aside and
    then renamed or linked. So nobody ever reads half a file.
    """

    def __init__(
        self,
        uri: str,
        *,
        called: str,
        error: type[ClipmillError],
        way_out: str = "Check the path, its permissions and the free space",
    ) -> None:
        """Find the file system of `uri`; nothing is read or written yet.

        Args:
            uri: Where it is.
            called: What it is to its users, for messages.
            error: What is raised where a method says `error`.
            way_out: What to do about a file that cannot be read or written.

        Raises:
            error: No such kind of file system, the package that reads it is missing, or a URI with
                a query or a pattern.
        """
        self.uri = uri
        self._called, self._error, self._way_out = called, error, way_out
        try:
            self._fs, self._root = open_file_system(uri)
        except (ValueError, ImportError) as problem:
            raise error(f"{called} {uri}: {problem}") from problem
        if "://" in uri and not _REFUSED_CHARS.isdisjoint(self._root):
            raise error(
                f"{called} {uri}: a folder's URI has no query, and none of # ? * [ in its path; "
                "name another folder, or one on a disk by its path alone"
            )

    @property
    def is_local(self) -> bool:
        """Whether it is on a mounted file system."""
        return isinstance(self._fs, LocalFileSystem)

    def full_path(self, relative: str) -> str:
        """The path that the file system knows, for messages and local readers."""
        return f"{self._root}/{relative}"

    def publish(self, relative: str, content: bytes) -> None:
        """Write a file whole or not at all, replacing one of the same name; `error` if it fails."""
        path = self.full_path(relative)
        with self._errors(relative, "written"):
            if not self.is_local:
                self._fs.pipe_file(path, content)
                return
            os.replace(self._write_aside(path, content), path)

    def create(self, relative: str, content: bytes) -> None:
        """Write a file that must not exist yet; of two writers exactly one succeeds.

        On an object store what exists with this very content counts as written by this call: its
        answer may have been lost, and asked again the store says that the object exists. Writers
        that have to know which of them was first write contents that differ.

        Raises:
            FileExistsError: The file exists.
            error: It cannot be written.
        """
        path = self.full_path(relative)
        exists = False
        with self._errors(relative, "written"):
            # Outside the `try` below: a file in the place of the folder "exists" too.
            aside = self._write_aside(path, content) if self.is_local else None
            try:
                if aside is None:
                    self._create_object(path, content)
                else:
                    os.link(aside, path)  # unlike a rename, refuses to replace
            except FileExistsError:
                exists = aside is not None or self.read_if_there(relative) != content
            finally:
                if aside is not None:
                    os.unlink(aside)
        if exists:
            raise FileExistsError(f"{path} exists")

    def read(self, relative: str) -> bytes:
        """The content of a file; `error` if it is missing or cannot be read."""
        with self._errors(relative, "read"):
            return cast("bytes", self._fs.cat_file(self.full_path(relative)))

    def read_if_there(self, relative: str) -> bytes | None:
        """The content of a file, None if it is missing; `error` if it cannot be read."""
        with self._errors(relative, "read"):
            try:
                return cast("bytes", self._fs.cat_file(self.full_path(relative)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def names(self, folder: str) -> list[str]:
        """Names of what lies directly in a folder (`""`: this one), sorted, hidden ones left out.

        Empty if there is no such folder; `error` if it cannot be listed.
        """
        path = self.full_path(folder)
        with self._errors(folder, "listed"):
            try:
                entries = [str(entry).rstrip("/") for entry in self._fs.ls(path, detail=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []
        # Of a file, `ls` lists the file itself.
        names = sorted(entry.rsplit("/", 1)[-1] for entry in entries if entry != path.rstrip("/"))
        return [name for name in names if name and name[0] != "."]

    def files(self, folder: str) -> list[ListedFile]:
        """The files in a folder and in those within, hidden ones too; of a file, itself.

        Links are left out. Empty if there is no such folder; `error` if it cannot be listed, or if
        the file system does not say when files were written.
        """
        with self._errors(folder, "listed"):
            found = find_files(self._fs, self.full_path(folder))
        return [self._listed(info) for info in found.values() if info["type"] == "file"]

    def hidden_files(self, folder: str) -> list[ListedFile]:
        """Hidden files directly in a folder: probes, and what killed writers left half-written.

        Empty if there is no such folder; `error` as of `files`.
        """
        with self._errors(folder, "listed"):
            try:
                found = self._fs.ls(self.full_path(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        infos = [info for info in found if str(info["name"]).rsplit("/", 1)[-1].startswith(".")]
        return [self._listed(info) for info in infos if info["type"] == "file"]

    def list(self, folder: str, *, suffix: str) -> list[str]:
        """The files directly in a folder, by name; empty if there is no such folder."""
        return [f"{folder}/{name}" for name in self.names(folder) if name.endswith(suffix)]

    def upload(self, path: Path, relative: str) -> None:
        """Copy a local file to here, replacing one of the same name; `error` if it fails."""
        with self._errors(relative, "written"):
            self._fs.put_file(str(path), self.full_path(relative))

    def download(self, relative: str, path: Path) -> None:
        """Copy a file from here to a local path; `error` if it fails."""
        with self._errors(relative, "read"):
            self._fs.get_file(self.full_path(relative), str(path))

    def remove(self, relative: str) -> None:
        """Remove a file, or a folder with all in it, if it is there; `error` if it fails."""
        with self._errors(relative, "removed"):
            try:
                self._fs.rm(self.full_path(relative), recursive=True)
            except FileNotFoundError:
                return

    def num_bytes(self, relative: str) -> int:
        """Size of a file, or of all files in a folder; 0 if there is none."""
        with self._errors(relative, "listed"):
            found = find_files(self._fs, self.full_path(relative))
            return sum(int(info["size"]) for info in found.values())

    def file_bytes(self, relative: str) -> int | None:
        """Size of a file, or of what a link leads to; None if it is not there."""
        with self._errors(relative, "read"):
            try:
                return int(self._fs.info(self.full_path(relative))["size"])
            except FileNotFoundError:
                return None

    def current_time(self) -> datetime:
        """What the file system's clock says, by a file that is written, and removed; `error`."""
        probe = f".clock-{uuid.uuid4().hex}"
        self.publish(probe, b"")
        try:
            (file,) = self.files(probe)
        finally:
            self.remove(probe)
        return file.modified_at

    def remove_files(self, relatives: Iterable[str]) -> None:
        """Remove those files that are there, many at once; `error` if it fails.

        On a disk, folders that this empties go too.
        """
        paths = [self.full_path(relative) for relative in relatives]
        with (
            self._errors("files", "removed"),
            ThreadPoolExecutor(REMOVE_THREADS) as threads,
        ):
            list(threads.map(self._remove_file, paths))
        if self.is_local:
            for folder in {path.rpartition("/")[0] for path in paths}:
                self._remove_empty(folder)

    def modified_at(self, relative: str) -> datetime:
        """When a file, or the newest one in a folder, was last written; `error` if there is none.

        By the file system's clock.
        """
        with self._errors(relative, "read"):
            paths = find_files(self._fs, self.full_path(relative))
            if not paths:
                raise FileNotFoundError(f"no file at {self.full_path(relative)}")
            return cast("datetime", max(self._fs.modified(path) for path in paths))

    def _remove_empty(self, folder: str) -> None:
        """Remove a folder, and those around it that this empties, but those at the top."""
        num_root = len(self.full_path(""))
        with suppress(OSError):  # not empty
            os.rmdir(folder)
            while "/" in (folder := folder.rpartition("/")[0])[num_root:]:
                os.rmdir(folder)

    def _remove_file(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _listed(self, info: Mapping[str, Any]) -> ListedFile:
        return ListedFile(
            path=str(info["name"]).removeprefix(self.full_path("")),
            num_bytes=int(info["size"]),
            modified_at=self._modified_at(info),
        )

    def _modified_at(self, info: Mapping[str, Any]) -> datetime:
        for name in TIME_FIELDS:
            time_ = info.get(name)
            if isinstance(time_, datetime):
                return time_
            if isinstance(time_, int | float):
                return datetime.fromtimestamp(time_, UTC)
        raise self._error(
            f"{self._called} {self.uri}: its file system does not say when files were written, so "
            "that nobody can tell what is old enough to go"
        )

    def _create_object(self, path: str, content: bytes) -> None:
        for num_left in reversed(range(NUM_CREATE_TRIES)):
            try:
                with self._fs.open(path, "xb") as file:
                    file.write(content)
                return
            except (ValueError, NotImplementedError) as error:
                raise self._error(
                    f"{self._called} {self.uri}: its file system creates no file exclusively "
                    f"({error}), which two runs at once need; use a disk or an object store such "
                    "as s3://"
                ) from error
            except OSError as error:
                if not num_left or not is_write_conflict(error):
                    raise
                time.sleep(random.uniform(0, CREATE_PAUSE_SECONDS))

    def _write_aside(self, path: str, content: bytes) -> str:
        folder, name = path.rsplit("/", 1)
        os.makedirs(folder, exist_ok=True)
        aside = f"{folder}/.{name}.{uuid.uuid4().hex}"
        with open(aside, "wb") as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.unlink(aside)  # a full disk keeps no half file
                raise
        return aside

    @contextmanager
    def _errors(self, relative: str, verb: str) -> Iterator[None]:
        try:
            yield
        except file_system_errors() as error:
            what = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise self._error(
                f"{self._called} {self.uri}: {relative} cannot be {verb}: {what}. {self._way_out}"
            ) from error
