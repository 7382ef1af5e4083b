"""Arrays in files: a few named ones as the content of one, or one that is written in place.

Knows nothing of what they are.
"""

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def arrays_to_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The content of a file with these arrays."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def arrays_from_bytes(content: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a file, none of which may hold Python objects; ValueError if it is damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"no arrays can be read ({error})") from error


def resize_array(path: Path, *, descr: str, shape: tuple[int, ...]) -> int:
    """Make a file one array, with what it holds already in it; the place of its first byte.

    Its place on the disk is taken at once: a map of a file that turns out to have none kills.
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    first_byte = len(header.getvalue())  # the same for all shapes: numpy leaves room in it
    num_bytes = first_byte + np.dtype(descr).itemsize * int(np.prod(shape))
    path.touch()
    with path.open("r+b") as file:
        file.write(header.getvalue())
        file.truncate(num_bytes)
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    return first_byte
