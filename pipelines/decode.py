"""The decode stage: catalog rows -> pixels and texts that are ready to encode, or reject reasons.

Knows nothing of models beyond the geometry of their pixels. Where GPUs decode, it only looks at the
headers of images, and passes on those that a GPU can take.

Rows come out once for each wanted modality, so that an image and a text of one key are judged
and counted apart.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.decoding.jpeg_header import Geometry, gpu_geometry
from engine.images import ImageLimits, ImageRejected
from engine.preprocess import MAX_ORDINARY_ASPECT, Preprocessing, decode_pixels
from pipelines import schema
from pipelines.binary_columns import binary_views, only
from pipelines.fetching.fetch import FetchFailure, fetch_all
from pipelines.fetching.fetch_policy import FetchPolicy
from pipelines.fingerprints import row_fingerprints
from pipelines.progress import StageMeter, metered
from pipelines.schema import Decoder, Modality, Reason, Stage

# Of the bytes of a batch's images: with fewer for the GPU, theirs are copied, without what is
# between.
MIN_SHARED_SHARE = 0.5
# What takes the card's search for early ends too long: an image is searched by one of its programs,
# and 34 kB took an H100 up to 14 ms.
MAX_GPU_IMAGE_BYTES = 2 * 2**20

# At most, while transparency is composited (`ImageLimits.max_image_pixels`).
BYTES_PER_PIXEL = 17
# For what does not grow with an image: pixels of a batch, what a library or a tower works with.
ROW_BYTES = 2 * 2**30

# (reason, detail), or None for a row that is fine.
Verdict = tuple[str, str | None] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLimits:
    """What one row may cost, and how many may fail."""

    image: ImageLimits = field(default_factory=ImageLimits)
    """Bounds on one image."""
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    """From where it may be fetched, and in what time."""
    max_text_chars: int = 50_000
    """Longer texts are rejected; those between this and the token length are cut. A document
    that got into the caption column should be noticed."""
    max_reject_share: float = 0.1
    """The run stops once more than this share of its rows was rejected, and at least 20."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.max_text_chars < 1:
            raise ValueError(f"max_text_chars={self.max_text_chars}: expected at least 1")
        if not 0 <= self.max_reject_share <= 1:
            raise ValueError(f"max_reject_share={self.max_reject_share}: expected 0 to 1")

    @property
    def max_row_bytes(self) -> int:
        """Of memory that a row may make a process take on, where others died of its batch.

        Twice what an image at the bounds takes, and `ROW_BYTES`.
        """
        return ROW_BYTES + 2 * BYTES_PER_PIXEL * self.image.max_image_pixels

    def beside(self, catalog_uri: str) -> "RowLimits":
        """The same for the rows of a catalog; see `FetchPolicy.beside`."""
        return replace(self, fetch=self.fetch.beside(catalog_uri))


def decode_batch(
    table: pa.Table,
    *,
    modalities: Sequence[Modality],
    preprocessing: Preprocessing,
    limits: RowLimits,
    carry_columns: Sequence[str],
    decoder: Decoder = "cpu",
    meter: StageMeter | None = None,
) -> pa.Table:
    """Decode a batch of canonical rows (see `reading.CatalogDatasource`).

    Returns:
        One row for each wanted modality of each row: `key`, `modality`, `pixels` large_binary
        (uint8 [H, W, 3], RGB, HWC) or null, `encoded` large_binary (a JPEG that a GPU is to decode)
        or null, its `geometry` (`jpeg_header.Geometry`) or null, `text` or null, `fingerprint`,
        `stage`, `reason` and `detail` (null where the row is fine so far), `source_file`,
        `source_row`, carried columns.
    """
    with metered(meter) as size:
        parts = []
        for modality in modalities:
            wanted = wanted_rows(table, modality=modality)
            if modality == "image":
                pixels, encoded, geometries, verdicts = _images(
                    wanted, preprocessing=preprocessing, limits=limits, decoder=decoder
                )
                texts: Any = pa.nulls(wanted.num_rows, pa.string())
            else:
                texts, verdicts = _texts(wanted, limits=limits)
                pixels, encoded, geometries = _no_images(wanted.num_rows)
            contents = {
                schema.PIXELS: pixels,
                schema.ENCODED: encoded,
                schema.GEOMETRY: geometries,
                schema.TEXT: texts,
            }
            parts.append(
                _judged(
                    wanted,
                    modality=modality,
                    contents=contents,
                    verdicts=verdicts,
                    carry_columns=carry_columns,
                )
            )
        decoded = pa.concat_tables(parts)
        size(decoded.num_rows, decoded.nbytes)
    return decoded


def wanted_rows(table: pa.Table, *, modality: Modality) -> pa.Table:
    """Those canonical rows of which this modality is wanted."""
    if pc.all(table[schema.WANTED[modality]]).as_py():
        return table
    return table.filter(table[schema.WANTED[modality]])


def undecodable(
    table: pa.Table, causes: Mapping[int, str], *, modality: Modality, carry_columns: Sequence[str]
) -> pa.Table:
    """Rows that cannot be decoded without harm, as `decode_batch` would give them: as rejects.

    Args:
        table: Canonical rows.
        causes: Row of the table -> what it did.
        modality: Of which that is.
        carry_columns: As of `decode_batch`.
    """
    pixels, encoded, geometries = _no_images(len(causes))
    return _judged(
        table.take(pa.array(causes, pa.int64())),
        modality=modality,
        contents={
            schema.PIXELS: pixels,
            schema.ENCODED: encoded,
            schema.GEOMETRY: geometries,
            schema.TEXT: pa.nulls(len(causes), pa.string()),
        },
        verdicts=[
            (Reason.POISON.value, f"a process that decoded it alone {cause}")
            for cause in causes.values()
        ],
        carry_columns=carry_columns,
    )


def _no_images(num_rows: int) -> tuple[pa.Array, pa.Array, pa.Array]:
    pixels = encoded = pa.nulls(num_rows, pa.large_binary())
    return pixels, encoded, pa.nulls(num_rows, schema.GEOMETRY_TYPE)


def _judged(
    table: pa.Table,
    *,
    modality: Modality,
    contents: Mapping[str, pa.Array],
    verdicts: Sequence[Verdict],
    carry_columns: Sequence[str],
) -> pa.Table:
    stages = [Stage.DECODE.value if verdict is not None else None for verdict in verdicts]
    return pa.table(
        {
            schema.KEY: table[schema.KEY],
            schema.MODALITY: pa.repeat(modality, table.num_rows),
            **contents,
            schema.FINGERPRINT: row_fingerprints(table, modality=modality),
            schema.STAGE: pa.array(stages, pa.string()),
            schema.REASON: pa.array([v and v[0] for v in verdicts], pa.string()),
            schema.DETAIL: pa.array([v and v[1] for v in verdicts], pa.string()),
            schema.SOURCE_FILE: table[schema.SOURCE_FILE],
            schema.SOURCE_ROW: table[schema.SOURCE_ROW],
            **{name: table[name] for name in carry_columns},
        }
    )


def _images(
    table: pa.Table, *, preprocessing: Preprocessing, limits: RowLimits, decoder: Decoder
) -> tuple[pa.Array, pa.Array, pa.Array, list[Verdict]]:
    views = binary_views(table[schema.IMAGE])
    uris = table[schema.IMAGE_URI].to_pylist()
    # Bytes that are there win; a path beside them only says where they once came from.
    is_missing = [view is None and bool(uri) for view, uri in zip(views, uris, strict=True)]
    pixels: list[bytes | None] = []
    verdicts: list[Verdict] = []
    geometries: list[Geometry | None] = []
    passed_on: list[Any] = []
    num_bytes = np.zeros(len(views), dtype=np.int64)
    fetched = fetch_all(
        list(compress(uris, is_missing)),
        max_bytes=limits.image.max_image_bytes,
        policy=limits.fetch,
    )
    with closing(fetched):
        for row, view in enumerate(views):
            # One after the other: only what a GPU is to decode is kept.
            content: Any = next(fetched) if is_missing[row] else view
            num_bytes[row] = len(content) if isinstance(content, bytes | memoryview) else 0
            geometry = _gpu_geometry(content, limits=limits.image) if decoder == "gpu" else None
            pixel, verdict = None, None
            if geometry is None:
                pixel, verdict = _image(content, preprocessing=preprocessing, limits=limits.image)
            geometries.append(geometry)
            passed_on.append(None if geometry is None else content)
            pixels.append(pixel)
            verdicts.append(verdict)
    is_passed_on = np.array([geometry is not None for geometry in geometries], dtype=np.bool_)
    share = num_bytes[is_passed_on].sum() / max(1, num_bytes.sum())
    if not is_passed_on.any():
        encoded = pa.nulls(len(views), pa.large_binary())
    elif is_passed_on[is_missing].any() or share < MIN_SHARED_SHARE:
        encoded = pa.array(passed_on, pa.large_binary())
    else:
        encoded = only(table[schema.IMAGE], is_passed_on)
    geometry = pa.array(geometries, schema.GEOMETRY_TYPE)
    return pa.array(pixels, pa.large_binary()), encoded, geometry, verdicts


def _gpu_geometry(content: Any, *, limits: ImageLimits) -> Geometry | None:
    if not isinstance(content, bytes | memoryview) or len(content) > MAX_GPU_IMAGE_BYTES:
        return None
    return gpu_geometry(content, limits=limits, max_aspect=MAX_ORDINARY_ASPECT)


def _image(
    content: Any, *, preprocessing: Preprocessing, limits: ImageLimits
) -> tuple[bytes | None, Verdict]:
    if content is None:
        return None, (Reason.NULL_IMAGE.value, None)
    if isinstance(content, FetchFailure):
        return None, (content.reason.value, content.detail)
    try:
        pixels = decode_pixels(content, preprocessing=preprocessing, limits=limits)
    except ImageRejected as error:
        return None, (error.reason, error.detail)
    return np.ascontiguousarray(pixels).tobytes(), None


def _texts(table: pa.Table, *, limits: RowLimits) -> tuple[pa.Array, list[Verdict]]:
    texts: list[str | None] = []
    verdicts: list[Verdict] = []
    for content in table[schema.TEXT].to_pylist():
        text, verdict = _text(content, limits=limits)
        texts.append(text)
        verdicts.append(verdict)
    return pa.array(texts, pa.string()), verdicts


def _text(content: bytes | None, *, limits: RowLimits) -> tuple[str | None, Verdict]:
    if content is None:
        return None, (Reason.NULL_TEXT.value, None)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        return None, (Reason.INVALID_TEXT.value, f"not UTF-8: {error.reason} at {error.start}")
    if not text.strip():
        return None, (Reason.EMPTY_TEXT.value, f"{len(text)} characters, all of them white space")
    if len(text) > limits.max_text_chars:
        detail = f"{len(text)} characters, more than {limits.max_text_chars}"
        return None, (Reason.TEXT_TOO_LONG.value, detail)
    return text, None
