"""Finds the ids that a key may have by its hash: sorted hashes with their ids, memory-mapped.

Knows nothing of the keys themselves: of several ids of one hash, who has them tells which it is.

    hashes.npy    uint64 [2, num_rows]: hashes ascending, and the id of each
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipelines.errors import StoreError

HASHES_FILE = "hashes.npy"
_INT64_BYTES = 8

Hashes = NDArray[np.uint64]
Ids = NDArray[np.int64]


def hash_content(content: bytes) -> int:
    """Hash of a key's bytes, 64 bits; all hashing of keys is done here."""
    return int(xxhash.xxh3_64_intdigest(content))


def key_content(key: object, *, key_type: pa.DataType) -> bytes | None:
    """The bytes of a key: UTF-8, or 8 bytes little-endian. None for what can't be such a key."""
    try:
        if key_type == pa.string():
            return key.encode() if isinstance(key, str) else None
        if not isinstance(key, int) or isinstance(key, bool):
            return None
        return key.to_bytes(_INT64_BYTES, "little", signed=True)
    except (OverflowError, UnicodeEncodeError):
        return None


def hash_keys(keys: pa.Array) -> Hashes:
    """Hashes uint64 [N] of keys [N], string or int64, without nulls."""
    if keys.type == pa.int64():
        contents = keys.to_numpy().astype("<i8").view(f"V{_INT64_BYTES}").tolist()
    else:
        contents = keys.cast(pa.binary()).to_pylist()
    return np.fromiter(map(hash_content, contents), dtype=np.uint64, count=len(contents))


class KeyHashes:
    """Hashes of all keys of a table, with their ids."""

    def __init__(self, path: Path) -> None:
        """Map a file; StoreError if it is missing or damaged."""
        try:
            pairs = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{path} is damaged or missing ({error})") from error
        if pairs.dtype != np.uint64 or pairs.ndim != 2 or len(pairs) != 2:
            raise StoreError(f"{path} is damaged: it holds {pairs.dtype} {list(pairs.shape)}")
        # Without the subclass, whose every access takes microseconds.
        self.hashes: Hashes = pairs[0].view(np.ndarray)
        self.ids: Ids = pairs[1].view(np.ndarray).view(np.int64)

    def __len__(self) -> int:
        return len(self.hashes)

    def candidates(self, content: bytes) -> Iterator[int]:
        """The ids that a key of these bytes may have."""
        hash_ = hash_content(content)
        position = int(self.hashes.searchsorted(np.uint64(hash_)))
        while position < len(self.hashes) and int(self.hashes[position]) == hash_:
            yield int(self.ids[position])
            position += 1

    def spans(self, hashes: Hashes) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """For each hash [N]: its ids are `ids[first:end]`; returns `first` and `end`."""
        first = np.searchsorted(self.hashes, hashes, side="left")
        return first, np.searchsorted(self.hashes, hashes, side="right")

    def changed(self, *, removed: Ids, hashes: Hashes, ids: Ids) -> tuple[Hashes, Ids]:
        """Hashes and ids, as they are written, without some ids and with others.

        Args:
            removed: Ids that go.
            hashes: Of new keys, in any order.
            ids: Theirs.
        """
        kept_hashes, kept_ids = self.hashes, self.ids
        if len(removed):
            keep = ~np.isin(kept_ids, removed)
            kept_hashes, kept_ids = kept_hashes[keep], kept_ids[keep]
        order = np.argsort(hashes, kind="stable")
        hashes, ids = hashes[order], ids[order]
        places = np.searchsorted(kept_hashes, hashes, side="right")
        return np.insert(kept_hashes, places, hashes), np.insert(kept_ids, places, ids)


def write_hashes(path: Path, *, hashes: Hashes, ids: Ids) -> None:
    """Write a file whole, of hashes in ascending order and their ids; StoreError if it fails."""
    with whole_file(path) as aside, aside.open("wb") as file:
        head = {"descr": "<u8", "fortran_order": False, "shape": (2, len(hashes))}
        np.lib.format.write_array_header_1_0(file, head)
        for part in (hashes, ids):
            file.write(np.ascontiguousarray(part).data)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; afterwards that file is on the disk, as `path`.

    Raises:
        StoreError: It cannot be written; nothing of it is left.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror or error}. Check its permissions and the "
            "free space"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink()
