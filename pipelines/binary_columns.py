"""The contents of large_binary columns, where they lie in memory.

Knows nothing of what they are, but that pixels of one shape may follow each other.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def binary_views(column: Any) -> list[memoryview | None]:
    """Each row's bytes, not copied; None where it is null. They keep the column alive."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    views: list[memoryview | None] = []
    for chunk in chunks:
        offsets, content = _parts(chunk)
        whole, is_valid = content.data, chunk.is_valid().to_pylist()
        views += [
            whole[first:last] if valid else None
            for first, last, valid in zip(
                offsets[:-1].tolist(), offsets[1:].tolist(), is_valid, strict=True
            )
        ]
    return views


def only(column: Any, is_kept: NDArray[np.bool_]) -> Any:
    """The column with null in all other rows.

    Contents are not copied, so that those of the other rows stay in memory: not for few rows, nor
    for `pixel_array`.
    """
    if isinstance(column, pa.ChunkedArray):
        ends = np.cumsum([len(chunk) for chunk in column.chunks])
        kept = np.split(is_kept, ends[:-1])
        return pa.chunked_array(map(only, column.chunks, kept), column.type)
    _, offsets, content = column.buffers()
    flags = np.concatenate([np.zeros(column.offset, dtype=np.bool_), is_kept])
    validity = pa.py_buffer(np.packbits(flags, bitorder="little"))
    return pa.Array.from_buffers(
        column.type, len(column), [validity, offsets, content], offset=column.offset
    )


def pixel_array(column: Any, *, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The valid pixels of a column as uint8 [N, H, W, 3]; one chunk is not copied."""
    offsets, content = _parts(_one_array(column))
    # Nulls take no bytes here, so what lies between first and last offset is all valid pixels.
    return content[offsets[0] : offsets[-1]].reshape(-1, *shape)


def contents(column: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes [B] of a column, and where in them valid rows start and end [N, 2].

    One chunk is not copied; between them there may be bytes of other rows.
    """
    array = _one_array(column)
    offsets, content = _parts(array)
    bounds = np.stack([offsets[:-1], offsets[1:]], axis=1)
    return content, bounds[array.is_valid().to_numpy(zero_copy_only=False)]


def _one_array(column: Any) -> Any:
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _parts(array: Any) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Offsets of an array's rows [N + 1], and the bytes that they count in."""
    _, offsets, content = array.buffers()
    if len(array) == 0 or content is None:
        return np.zeros(len(array) + 1, dtype=np.int64), np.empty(0, dtype=np.uint8)
    numbers = np.frombuffer(offsets, dtype=np.int64)
    return numbers[array.offset : array.offset + len(array) + 1], np.frombuffer(
        content, dtype=np.uint8
    )
