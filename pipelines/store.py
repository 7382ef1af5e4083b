"""The output root on any file system: publishes files whole, creates manifests once.

Knows nothing of what the files hold.

    STORE/
      snapshots/00000001.json      one complete state each, written last, never changed
      embeddings/PLAN/*.parquet    rows; what no snapshot lists does not exist for a reader
      rejects/PLAN/*.parquet
      indexes/00000001/image/      index.faiss, keys.parquet, manifest.json last
      runs/RUN/                    report.html, report.json
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import CommitConflictError, StoreError
from pipelines.file_systems import file_system_errors, open_file_system


class Store:
    """A folder at any fsspec URI. Small, and safe to send to workers."""

    def __init__(self, uri: str) -> None:
        """Find the file system of `uri`; nothing is read or written yet.

        Raises:
            StoreError: No such kind of file system, or the package that reads it is missing.
        """
        self.uri = uri
        try:
            self._fs, self._root = open_file_system(uri)
        except (ValueError, ImportError) as error:
            raise StoreError(f"store {uri}: {error}") from error

    @property
    def is_local(self) -> bool:
        """Whether the store is on a mounted file system."""
        return isinstance(self._fs, LocalFileSystem)

    def full_path(self, relative: str) -> str:
        """The path that the file system knows, for messages and local readers."""
        return f"{self._root}/{relative}"

    def check_writable(self) -> None:
        """Write and remove a probe; StoreError if the store cannot be written."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.create(probe, b"")  # what a commit will do, hours later
        with self._errors(probe, "removed"):
            self._fs.rm_file(self.full_path(probe))

    def publish(self, relative: str, content: bytes) -> None:
        """Write a file whole or not at all, replacing one of the same name."""
        path = self.full_path(relative)
        with self._errors(relative, "written"):
            if not self.is_local:
                self._fs.pipe_file(path, content)  # an object appears when its upload ends
                return
            os.replace(self._write_aside(path, content), path)

    def create(self, relative: str, content: bytes) -> None:
        """Write a file that must not exist yet; of two writers exactly one succeeds.

        Raises:
            CommitConflictError: The file exists.
            StoreError: It cannot be written.
        """
        path = self.full_path(relative)
        with self._errors(relative, "written"):
            # Outside the `try` below: a file in the place of the folder "exists" too.
            aside = self._write_aside(path, content) if self.is_local else None
            try:
                if aside is None:
                    with self._fs.open(path, "xb") as file:
                        file.write(content)
                else:
                    os.link(aside, path)  # unlike a rename, refuses to replace
            except FileExistsError:
                raise CommitConflictError(
                    f"{path} exists: another run committed it first. Nothing was lost; run the "
                    "same command again"
                ) from None
            finally:
                if aside is not None:
                    os.unlink(aside)

    def read(self, relative: str) -> bytes:
        """The content of a file; StoreError if it is missing or cannot be read."""
        with self._errors(relative, "read"):
            return cast("bytes", self._fs.cat_file(self.full_path(relative)))

    @contextmanager
    def open(self, relative: str) -> Iterator[BinaryIO]:
        """Open a file for reading at any position.

        Raises:
            StoreError: It is missing, cannot be read, or pyarrow finds it damaged while it is open.
        """
        with self._errors(relative, "read"), self._fs.open(self.full_path(relative), "rb") as file:
            try:
                yield cast("BinaryIO", file)
            except pa.ArrowException as error:
                raise StoreError(
                    f"store {self.uri}: {relative} is damaged ({str(error).splitlines()[0]}); put "
                    "back a copy of it, or embed into another store"
                ) from error

    def list(self, folder: str, *, suffix: str) -> list[str]:
        """The files directly in a folder, by name; empty if there is no such folder."""
        with self._errors(folder, "listed"):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self.full_path(folder), detail=False)
            except FileNotFoundError:
                return []
        names = sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return [f"{folder}/{name}" for name in names if name.endswith(suffix) and name[0] != "."]

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
        except StoreError:
            raise
        except file_system_errors() as error:
            what = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StoreError(
                f"store {self.uri}: {relative} cannot be {verb}: {what}. "
                "Check the path, its permissions and the free space"
            ) from error
