"""Control rows: harmless ones, that a process has to survive before another row is blamed.

Knows nothing of how they are done. They are what the rows beside them are for the stage, so that
what it does with those is done with these: an engine, a library or a GPU that is broken is the end
of them as well.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from engine.decoding.jpeg_header import gpu_geometry
from engine.images import ImageLimits
from engine.preprocess import MAX_ORDINARY_ASPECT, Preprocessing
from pipelines import schema
from pipelines.schema import Decoder, Modality

TEXT = "a red bicycle leaning on a wall"
# Of a photo on a page of products.
_WIDTH, _HEIGHT = 320, 240


def rows_to_decode(like: pa.Schema) -> pa.Table:
    """A row with an image and a text, of which each is wanted.

    Args:
        like: Of canonical rows.
    """
    wanted = {name: [True] for name in schema.WANTED.values()}
    return _rows(like, {schema.IMAGE: [_jpeg()], schema.TEXT: [TEXT.encode()], **wanted})


def rows_to_encode(
    like: pa.Schema,
    *,
    modalities: Sequence[Modality],
    preprocessing: Preprocessing,
    decoder: Decoder,
) -> pa.Table:
    """One row of each kind that the encode stage takes.

    Args:
        like: Of decoded rows.
        modalities: Of the catalog.
        preprocessing: Of the engine.
        decoder: What decodes images.
    """
    kinds: list[tuple[str, Any]] = []
    if "image" in modalities:
        pixels = _gradient(preprocessing.width, preprocessing.height)
        kinds.append((schema.PIXELS, pixels.tobytes()))
    if decoder == "gpu":
        kinds.append((schema.ENCODED, _jpeg()))
    if "text" in modalities:
        kinds.append((schema.TEXT, TEXT))
    contents = {
        name: [content if kind == name else None for kind, content in kinds]
        for name in (schema.PIXELS, schema.ENCODED, schema.TEXT)
    }
    geometries = [
        encoded and gpu_geometry(encoded, limits=ImageLimits(), max_aspect=MAX_ORDINARY_ASPECT)
        for encoded in contents[schema.ENCODED]
    ]
    return _rows(like, {**contents, schema.GEOMETRY: geometries})


def _rows(like: pa.Schema, contents: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Rows of a schema with these contents, and nulls in all other columns."""
    (num_rows,) = set(map(len, contents.values()))
    columns = {
        field.name: pa.array(contents[field.name], field.type)
        if field.name in contents
        else pa.nulls(num_rows, field.type)
        for field in like
    }
    return pa.table(columns, schema=like)


def _jpeg() -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(_gradient(_WIDTH, _HEIGHT)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def _gradient(width: int, height: int) -> NDArray[np.uint8]:
    """Pixels uint8 [height, width, 3], RGB, HWC."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (255 * x // width, 255 * y // height, 127 + 64 * ((x // 16 + y // 16) % 2))
    return np.stack(channels, axis=-1).astype(np.uint8)
