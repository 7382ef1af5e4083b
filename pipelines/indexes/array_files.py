"""A few named arrays as the content of one file.

Knows nothing of what they are.
"""

import io
import zipfile
from collections.abc import Mapping
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
