"""The one protocol of all backends, and what they share: checks, tokens, batches, order.

Knows no runtime.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.manifest import TOKENIZER_FILE, Manifest
from engine.tokenization import Tokenizer

# A norm farther from 1 is a wrong answer; 16-bit arithmetic stays within a tenth of it.
NORM_TOLERANCE = 0.01


class Encoder(Protocol):
    """An engine, loaded and ready to run in this process.

    Embeddings are float32 [N, D] of unit norm. A row that the engine gives no unit vector for, say
    because it exceeds 16 bit, is NaN throughout: never a wrong answer, and no harm to the others.
    """

    manifest: Manifest
    device_memory_bytes: int
    """Taken on a GPU; 0 on a CPU."""
    max_calls: int
    """At a time, by different threads; whoever has more to call waits outside."""

    def encode_images(self, pixels: Any) -> NDArray[np.float32]:
        """Pixels uint8 [N, H, W, 3], RGB, HWC -> float32 [N, D], unit norm or NaN.

        An array in host memory; the `torch` backend also takes a contiguous tensor on its card that
        no work under way will still change.
        """
        ...

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts -> float32 [N, D], unit norm or NaN; a text beyond the token length is cut."""
        ...

    def close(self) -> None:
        """Give the GPU's memory back; the encoder can't be used any more."""
        ...


class TowerRunner(Protocol):
    """One tower, loaded by a backend."""

    max_rows: int
    """Of one batch."""
    length_step: int
    """Lengths of token rows are multiples of this, so that a backend meets few shapes."""

    def run(self, batches: Iterable[Any]) -> Iterator[NDArray[np.float32]]:
        """Batches of at most `max_rows` rows -> their embeddings float32 [rows, D], in order.

        A backend may take several batches before it yields the first result.
        """
        ...


class TowerEncoder:
    """An `Encoder` made of the towers that a backend has loaded."""

    device_memory_bytes = 0
    max_calls = 1

    def __init__(
        self,
        engine_dir: Path,
        *,
        manifest: Manifest,
        image: TowerRunner,
        text: TowerRunner | None,
    ) -> None:
        """Join the towers of an engine.

        Args:
            engine_dir: The engine's folder, for the tokenizer.
            manifest: Of that engine.
            image: Takes pixels uint8 [rows, H, W, 3].
            text: Takes token ids int32 [rows, T]; None where the engine has no text tower.

        Raises:
            EngineError: The tokenizer is missing or damaged.
        """
        self.manifest = manifest
        self._image = image
        self._text = text
        if manifest.text is not None:
            self._tokenizer = Tokenizer(engine_dir / TOKENIZER_FILE, text=manifest.text)

    def encode_images(self, pixels: Any) -> NDArray[np.float32]:
        """Pixels uint8 [N, H, W, 3], RGB, HWC -> float32 [N, D], unit norm or NaN."""
        preprocessing = self.manifest.preprocessing
        expected = (preprocessing.height, preprocessing.width, 3)
        # By name: PyTorch's types, of pixels that are on a card, are not NumPy's.
        if tuple(pixels.shape[1:]) != expected or not str(pixels.dtype).endswith("uint8"):
            raise ValueError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}, the engine takes "
                f"uint8 [N, {', '.join(map(str, expected))}]"
            )
        step = self._image.max_rows
        rows = [slice(first, first + step) for first in range(0, len(pixels), step)]
        parts = self._image.run(pixels[chosen] for chosen in rows)
        return self._joined(rows, parts, num_rows=len(pixels))

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts -> float32 [N, D], unit norm or NaN; a text beyond the token length is cut."""
        if self._text is None:
            raise EngineError(
                f"engine {self.manifest.engine_id} of {self.manifest.checkpoint} has no text tower"
            )
        batches = list(
            self._tokenizer.batches(
                texts, max_rows=self._text.max_rows, length_step=self._text.length_step
            )
        )
        parts = self._text.run(token_ids for _, token_ids in batches)
        return self._joined([rows for rows, _ in batches], parts, num_rows=len(texts))

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is beyond the token length, so that its end is not encoded."""
        return [] if self._text is None else self._tokenizer.are_cut(texts)

    def _joined(
        self, rows: Sequence[Any], parts: Iterable[NDArray[np.float32]], *, num_rows: int
    ) -> NDArray[np.float32]:
        embeddings = np.empty((num_rows, self.manifest.embedding_dim), dtype=np.float32)
        for chosen, part in zip(rows, parts, strict=True):
            embeddings[chosen] = part
        return normalized(embeddings)

    def close(self) -> None:
        """Give back what the towers hold on a device; on a CPU there is nothing."""


def normalized(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows float32 [N, D] that are of unit norm but for rounding, without it; others as NaN."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    norms[~(np.abs(norms - 1) <= NORM_TOLERANCE)] = np.nan  # NaN itself too
    unit: NDArray[np.float32] = embeddings / norms
    return unit
