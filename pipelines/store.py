"""The output root on any file system: publishes files whole, creates manifests once.

Knows nothing of what the files hold.

    STORE/
      snapshots/00000001.json      one complete state each, written last, never changed
      embeddings/PLAN/*.parquet    rows; what no snapshot lists does not exist for a reader
      rejects/PLAN/*.parquet
      indexes/INDEX/               manifest.json last, and BUILD/ with its files
      runs/RUN/                    run.json, report.html, report.json
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import pyarrow as pa

from engine.publishing.file_systems import open_parts
from engine.publishing.folders import Folder
from pipelines.errors import CommitConflictError, StoreError


class Store(Folder):
    """The folder of a store."""

    def __init__(self, uri: str) -> None:
        """Find the file system of `uri`; nothing is read or written yet.

        Raises:
            StoreError: No such kind of file system, or the package that reads it is missing.
        """
        super().__init__(uri, called="store", error=StoreError)

    def check_writable(self) -> None:
        """Write and remove a probe.

        Raises:
            StoreError: The store cannot be written, or lets two writers create the same file.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        # What a commit will do, hours later. (Of an empty object s3fs does not ask if it is new.)
        self.create(probe, b"probe")
        try:
            self.create(probe, b"another")
        except CommitConflictError:
            return
        finally:
            self.remove(probe)
        raise StoreError(
            f"store {self.uri}: its file system replaced a file that was to be created anew (an "
            "object store that ignores If-None-Match?), so two runs at once would overwrite each "
            "other's snapshots; use a disk, or an object store that heeds it"
        )

    def create(self, relative: str, content: bytes) -> None:
        """Write a file that must not exist yet; of two writers exactly one succeeds.

        Raises:
            CommitConflictError: The file exists.
            StoreError: It cannot be written.
        """
        try:
            super().create(relative, content)
        except FileExistsError as error:
            raise CommitConflictError(
                f"{error}: another run committed it first. Nothing was lost; run the same command "
                "again"
            ) from None

    @contextmanager
    def open(self, relative: str) -> Iterator[BinaryIO]:
        """Open a file for reading at any position, and nothing beside what is read.

        Raises:
            StoreError: It is missing, cannot be read, or pyarrow finds it damaged while it is open.
        """
        path = self.full_path(relative)
        with self._errors(relative, "read"), open_parts(self._fs, path) as file:
            try:
                yield cast("BinaryIO", file)
            except pa.ArrowException as error:
                raise StoreError(
                    f"store {self.uri}: {relative} is damaged ({str(error).splitlines()[0]}); put "
                    "back a copy of it, or embed into another store"
                ) from error
