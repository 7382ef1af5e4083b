"""The one protocol of all backends: arrays or texts in, unit embeddings out.

Knows no runtime.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.manifest import Manifest


class Encoder(Protocol):
    """An engine, loaded and ready to run in this process."""

    manifest: Manifest

    def encode_images(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels uint8 [N, H, W, 3], RGB, HWC -> float32 [N, D], unit norm."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts -> float32 [N, D], unit norm; a text beyond the token length is cut."""
        ...
