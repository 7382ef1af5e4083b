"""Sets of ids as bitmaps: bit i & 7 of byte i >> 3, as FAISS reads them.

Knows nothing of what the ids are of.
"""

import numpy as np
from numpy.typing import NDArray

Bitmap = NDArray[np.uint8]
Ids = NDArray[np.int64]


def bitmap_of(ids: Ids, *, num_ids: int) -> Bitmap:
    """The set of some ids below `num_ids`."""
    flags = np.zeros(num_ids, dtype=np.bool_)
    flags[ids] = True
    return np.packbits(flags, bitorder="little")


def is_set(bitmap: Bitmap, ids: Ids) -> NDArray[np.bool_]:
    """Which of some ids [N] are in a set."""
    return np.asarray((bitmap[ids >> 3] >> (ids & 7).astype(np.uint8)) & 1, dtype=np.bool_)


def ids_in(bitmap: Bitmap) -> Ids:
    """The ids of a set, ascending."""
    return np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))


def num_in(bitmap: Bitmap) -> int:
    """How many ids a set has."""
    return int(np.bitwise_count(bitmap).sum())
