"""Inverted lists in one file: written in a stream, merged list by list, memory-mapped.

Knows nothing of what the codes mean.

    list 0: codes uint8 [n0, code_size], ids int64 [n0]; list 1: ...; as FAISS maps them
    sizes int64 [num_lists], code_size and num_lists int64, MAGIC
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipelines.indexes.bitmaps import Bitmap, is_set

MAGIC = b"clipmill lists 1"
_ID_BYTES = 8

Codes = NDArray[np.uint8]
Ids = NDArray[np.int64]


class Lists:
    """Inverted lists, memory-mapped: nothing is read until it is asked for."""

    def __init__(self, path: Path) -> None:
        """Map a file; ValueError if it is not what was written, OSError if it is not there."""
        self.path = path
        # A plain array, whose parts are had faster than those of a map.
        mapped = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        tail = mapped[-len(MAGIC) - 16 :].tobytes()
        if not tail.endswith(MAGIC):
            raise ValueError(f"{path} is cut or no file of lists")
        self.code_size, num_lists = np.frombuffer(tail[:16], dtype=np.int64).tolist()
        end = len(mapped) - len(MAGIC) - 16
        self.sizes = mapped[end - 8 * num_lists : end].view(np.int64)
        """int64 [num_lists]."""
        self._offsets = np.concatenate([[0], np.cumsum(self.sizes * (self.code_size + _ID_BYTES))])
        self.num_bytes = int(self._offsets[-1])
        """Of codes and ids."""
        if len(self.sizes) != num_lists or self.num_bytes != end - 8 * num_lists:
            raise ValueError(f"{path} has {len(mapped)} bytes, which its list sizes are not")
        self._mapped = mapped

    @property
    def num_rows(self) -> int:
        """In all lists."""
        return int(self.sizes.sum())

    def codes(self, number: int) -> Codes:
        """Codes uint8 [n, code_size] of one list."""
        first = self._offsets[number]
        part = self._mapped[first : first + self.sizes[number] * self.code_size]
        return part.reshape(-1, self.code_size)

    def ids(self, number: int) -> Ids:
        """Ids int64 [n] of one list."""
        end = self._offsets[number + 1]
        part: Ids = self._mapped[end - self.sizes[number] * _ID_BYTES : end].view(np.int64)
        return part

    def attach(self, ivf: Any) -> None:
        """Make these the lists of a trained FAISS index, which maps the file for itself."""
        lists = faiss.OnDiskInvertedLists()
        lists.nlist, lists.code_size = len(self.sizes), self.code_size
        lists.filename, lists.totsize, lists.read_only = str(self.path), self.num_bytes, True
        lists.prefetch_nthread = 0
        lists.lists.resize(lists.nlist)
        sizes = np.ascontiguousarray(self.sizes, dtype=np.uint64)
        lists.set_all_lists_sizes(faiss.swig_ptr(sizes))
        if self.num_bytes:
            lists.do_mmap()
        lists.this.disown()
        ivf.replace_invlists(lists, True)
        ivf.ntotal = self.num_rows


def write_lists(path: Path, lists: Iterable[tuple[Codes, Ids]], *, code_size: int) -> None:
    """Write lists in their order; OSError if the disk is full."""
    sizes = []
    with path.open("wb") as file:
        for codes, ids in lists:
            sizes.append(len(ids))
            file.write(np.ascontiguousarray(codes).data)
            file.write(np.ascontiguousarray(ids, dtype=np.int64).data)
        file.write(np.array([*sizes, code_size, len(sizes)], dtype=np.int64).data)
        file.write(MAGIC)


def lists_of(ivf: Any) -> Iterable[tuple[Codes, Ids]]:
    """The lists of a FAISS index in memory, as views that end with it."""
    for number in range(ivf.nlist):
        size, inverted = ivf.invlists.list_size(number), ivf.invlists
        codes = faiss.rev_swig_ptr(inverted.get_codes(number), size * ivf.code_size)
        ids = faiss.rev_swig_ptr(inverted.get_ids(number), size)
        yield codes.reshape(size, ivf.code_size), ids


def merged_lists(
    parts: Sequence[Lists], *, removed: Bitmap | None = None
) -> Iterable[tuple[Codes, Ids]]:
    """The lists of several files together; a list is in memory at once.

    Args:
        parts: Of the same training.
        removed: Ids that the first of them shall lose, as a bitmap; None: none.
    """
    for number in range(len(parts[0].sizes)):
        codes = [part.codes(number) for part in parts]
        ids = [part.ids(number) for part in parts]
        if removed is not None:
            kept = ~is_set(removed, ids[0])
            if not kept.all():
                codes[0], ids[0] = codes[0][kept], ids[0][kept]
        yield np.concatenate(codes), np.concatenate(ids)
