"""A batch of encoded JPEGs in one piece of memory, as a card's decoder takes them.

Knows nothing of how they are decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.decoding.jpeg_header import Geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class Jpegs:
    """A batch of images of which `jpeg_header.gpu_geometry` knows."""

    content: NDArray[np.uint8]
    """[bytes], C-contiguous: all of them, and whatever lies between."""
    bounds: NDArray[np.int64]
    """[N, 2]: where in it each starts, and where it ends."""
    geometries: NDArray[np.int64]
    """[N, 3]: of each, in the order of the fields."""

    def __len__(self) -> int:
        """N."""
        return len(self.bounds)

    def image(self, row: int) -> bytes:
        """One of them, copied."""
        first, last = self.bounds[row]
        return self.content[first:last].tobytes()


def jpegs_of(encoded: Sequence[bytes], *, geometries: Sequence[Geometry]) -> Jpegs:
    """Images that lie apart, copied to one piece of memory."""
    ends = np.cumsum([0, *map(len, encoded)])
    return Jpegs(
        content=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        bounds=np.stack([ends[:-1], ends[1:]], axis=1),
        geometries=np.array(geometries, dtype=np.int64).reshape(-1, len(Geometry._fields)),
    )
