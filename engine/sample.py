"""Rows sampled from a catalog: what an engine is calibrated with, and what its gate asks it.

Knows nothing of catalogs or of how the rows were chosen.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A calibration with fewer rows misses too many of the rare large activations.
MIN_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Decoded rows, images and texts of the same rows."""

    uri: str
    """The catalog."""
    pixels: NDArray[np.uint8] | None
    """[N, H, W, 3], RGB, HWC, of the engine's preprocessing; None without images."""
    texts: tuple[str, ...] | None
    """One for each row; None without texts."""
    labels: tuple[str | None, ...] | None = None
    """Class of each row, in words, None for a row without; None where the catalog has none."""

    @property
    def num_rows(self) -> int:
        """Rows of each kind."""
        return len(self.texts or ()) if self.pixels is None else len(self.pixels)

    @property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of the rows' content."""
        digest = hashlib.sha256()
        if self.pixels is not None:
            digest.update(repr(self.pixels.shape).encode())
            digest.update(np.ascontiguousarray(self.pixels).data)
        for text in self.texts or ():
            content = text.encode()
            digest.update(f"{len(content)}:".encode() + content)
        return digest.hexdigest()
