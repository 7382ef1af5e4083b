"""Files of an index as local paths: those of a store on a disk themselves, of others copies.

Knows nothing of what the files hold.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.store import Store

# Of a copy that nobody opened for so long; who has it open still keeps its files.
STALE_SECONDS = 7 * 24 * 3600.0


class IndexFiles:
    """The files of one folder of a store. Small, and safe to send to workers."""

    def __init__(self, store: Store, folder: str, *, cache_dir: Path) -> None:
        """Nothing is read or written yet.

        Args:
            store: Where they are.
            folder: In it.
            cache_dir: Where copies go, if the store is not on a disk; of one index alone.
        """
        self._store, self._folder = store, folder
        self.directory = Path(store.full_path(folder)) if store.is_local else cache_dir

    def names(self) -> list[str]:
        """Of the files that are in the store, sorted."""
        return self._store.names(self._folder)

    def names_in(self, folder: str) -> list[str]:
        """Of the files in a folder of it, sorted."""
        return self._store.names(f"{self._folder}/{folder}")

    def local(self, name: str) -> Path:
        """A file as a local path, copied there if it is not; StoreError if it cannot be read."""
        path = self.directory / name
        if not self._store.is_local and not path.exists():
            self._create_directory(path.parent)
            aside = _aside(path)
            try:
                self._store.download(f"{self._folder}/{name}", aside)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        return path

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write a file to, which is in the store, whole, when the block ends.

        Raises:
            StoreError: It cannot be written.
        """
        path = self.directory / name
        self._create_directory(path.parent)
        aside = _aside(path)
        try:
            try:
                yield aside
                with aside.open("rb") as file:
                    os.fsync(file.fileno())  # before the manifest that lists it
                os.replace(aside, path)
            except OSError as error:
                raise self._unwritable(name, error) from error
            self.publish(name)
        finally:
            aside.unlink(missing_ok=True)

    def publish(self, name: str) -> None:
        """Bring a whole file that lies here into the store; StoreError if it cannot be written."""
        if not self._store.is_local:
            self._store.upload(self.directory / name, f"{self._folder}/{name}")

    def create(self) -> None:
        """Make the local folder; StoreError if that fails."""
        self._create_directory(self.directory)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; StoreError if it cannot be written."""
        with self.writing(name) as path:
            path.write_bytes(content)

    def forget(self, name: str) -> None:
        """Remove a local copy, if it is one."""
        if not self._store.is_local:
            (self.directory / name).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all in it, here and in the store; StoreError."""
        self._store.remove(f"{self._folder}/{name}")
        path = self.directory / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)

    def _create_directory(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(str(path), error) from error

    def _unwritable(self, name: str, error: OSError) -> StoreError:
        return StoreError(
            f"store {self._store.uri}: {self._folder}/{name} cannot be written "
            f"({error.strerror or error}). Check the path, its permissions and the free space of "
            f"{self.directory}"
        )


def remove_stale_copies(root: Path, *, opened: Path) -> None:
    """Remove the copies of a store's indexes that have not been opened for a week.

    Args:
        root: Folders in its folders are copies.
        opened: That which is being opened.
    """
    os.utime(opened)
    for folder in root.glob("*/*"):
        with suppress(FileNotFoundError):  # another reader removes it as well
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
