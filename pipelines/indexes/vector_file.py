"""Vectors of an index as 16-bit floats in a file, written and read by id, a row here and there.

Knows nothing of what they are for. They are read and not mapped: the pages of a map count as this
process's memory, many of them around each row, and from a cold disk they come one after another.
"""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import StoreError
from pipelines.indexes.array_files import resize_array
from pipelines.indexes.manifest import WAY_OUT

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


class VectorFile:
    """A .npy file of float16 [N, D], open for several threads at once."""

    def __init__(self, path: Path) -> None:
        """Open it; ValueError if it is cut or no such array, OSError if it is not there."""
        mapped = np.load(path, mmap_mode="r")
        if mapped.dtype != np.float16 or mapped.ndim != 2:
            raise ValueError(f"{path} holds {mapped.dtype} {mapped.shape}, not float16 [N, D]")
        self._path = path
        self._first_byte = int(mapped.offset)
        self._dim = int(mapped.shape[1])
        self._row_bytes = self._dim * int(mapped.itemsize)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        # What lies around a row is of no use.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def rows(self, ids: Ids) -> Vectors:
        """The vectors float32 [N, D] of ids int64 [N] that are in the file; StoreError."""
        size = self._row_bytes
        content = bytearray(len(ids) * size)
        parts = memoryview(content)
        absent = []
        for place, row_id in enumerate(ids.tolist()):
            part, offset = parts[place * size : (place + 1) * size], self._offset(row_id)
            if not self._read_cached(part, offset):
                absent.append((part, offset))
        # All at once: a disk that is asked for one after another takes as many times as long.
        for _, offset in absent:
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        for part, offset in absent:
            self._read(part, offset)
        return (
            np.frombuffer(content, dtype=np.float16).reshape(len(ids), self._dim).astype(np.float32)
        )

    def _offset(self, row_id: int) -> int:
        return self._first_byte + row_id * self._row_bytes

    def _read(self, part: memoryview, offset: int) -> None:
        try:
            num_read = os.preadv(self._descriptor, [part], offset)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read ({error}); {WAY_OUT}") from error
        if num_read != len(part):
            raise StoreError(f"{self._path} was cut while it was open; {WAY_OUT}")

    def _read_cached(self, part: memoryview, offset: int) -> bool:
        """Read a row if it is in the machine's memory."""
        try:
            return os.preadv(self._descriptor, [part], offset, os.RWF_NOWAIT) == len(part)
        except OSError:  # it is not, or this file system cannot tell
            return False


def resize_vectors(path: Path, *, num_ids: int, dim: int) -> int:
    """Make a file one of so many vectors, those that it has first; the place of the first byte."""
    return resize_array(path, descr="<f2", shape=(num_ids, dim))


def write_at_ids(path: Path, placed: Iterable[tuple[Vectors, Ids]], *, first_byte: int) -> None:
    """Write rows [N, D] of 16-bit floats into a file, each where its id says.

    Not through a map: what is written that way stays in the process's memory.
    """
    with path.open("r+b") as file:
        for vectors, ids in placed:
            halves = np.ascontiguousarray(vectors, dtype=np.float16)
            # Runs of ids that follow each other are written at once.
            starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
            for run in np.split(np.arange(len(ids)), starts[1:]):
                if len(run):
                    file.seek(first_byte + int(ids[run[0]]) * halves.shape[1] * 2)
                    file.write(halves[run[0] : run[-1] + 1].data)
