"""Turns texts into rows of token ids, padded as the text tower was trained.

Knows nothing of what becomes of the ids. Needs no transformers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as TokenizerFile

from engine.errors import EngineError
from engine.manifest import TextInput


class Tokenizer:
    """An engine's `tokenizer.json`, which cuts at the text tower's length."""

    def __init__(self, path: Path, *, text: TextInput) -> None:
        """Load it; EngineError if the file is missing or damaged."""
        try:
            self._tokenizer = TokenizerFile.from_file(str(path))
        except Exception as error:  # tokenizers raises no other
            raise EngineError(
                f"{path}: cannot be loaded ({error}); remove the engine's folder, the next run "
                "builds it anew"
            ) from error
        self._text = text

    def batches(
        self, texts: Sequence[str], *, max_rows: int, length_step: int
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.int32]]]:
        """Texts as batches of like length, so that few are padded much.

        Args:
            texts: Any number of them.
            max_rows: Of one batch.
            length_step: Lengths are multiples of this, or the longest there is.

        Yields:
            The batch's row numbers in `texts`, and its token ids int32 [rows, length].
        """
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        order = np.argsort([len(ids) for ids in rows], kind="stable")
        for first in range(0, len(rows), max_rows):
            chosen = order[first : first + max_rows]
            yield chosen, self._padded([rows[row] for row in chosen], length_step=length_step)

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text has more tokens than are kept of it."""
        return [bool(found.overflowing) for found in self._tokenizer.encode_batch(list(texts))]

    def _padded(self, rows: Sequence[Sequence[int]], *, length_step: int) -> NDArray[np.int32]:
        """Rows in ascending length -> int32 [rows, length]."""
        length = self._text.max_tokens
        if not self._text.pads_to_max:
            length = min(length, -(-len(rows[-1]) // length_step) * length_step)
        padded = np.full((len(rows), length), self._text.pad_token_id, dtype=np.int32)
        for line, ids in zip(padded, rows, strict=True):
            line[: len(ids)] = ids
        return padded
