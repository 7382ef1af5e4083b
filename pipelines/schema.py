"""Every column name and Arrow schema of Clipmill, once.

Knows nothing of who reads or writes the columns.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal, get_args

import pyarrow as pa

from engine.images import REASONS as IMAGE_REASONS

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
EmbeddingDtype = Literal["float32", "float16"]
# Where JPEGs are decoded; CPUs decode all other images.
Decoder = Literal["cpu", "gpu"]
WantedDecoder = Literal["auto", "cpu", "gpu"]
WANTED_DECODERS: tuple[WantedDecoder, ...] = get_args(WantedDecoder)

# Of every table.
KEY = "key"
MODALITY = "modality"
FINGERPRINT = "fingerprint"
SOURCE_FILE = "source_file"
SOURCE_ROW = "source_row"

# Between the stages.
IMAGE = "image"
IMAGE_URI = "image_uri"
TEXT = "text"
VERSION = "version"
PIXELS = "pixels"
ENCODED = "encoded"
GEOMETRY = "geometry"
WANTED = {"image": "image_wanted", "text": "text_wanted"}

# Of embeddings.
EMBEDDING = "embedding"
ENGINE_ID = "engine_id"

# Of rejects.
STAGE = "stage"
REASON = "reason"
DETAIL = "detail"

# Of what the write stage reports: one row for each file written.
PATH = "path"
KIND = "kind"
NUM_ROWS = "num_rows"
NUM_BYTES = "num_bytes"

# Width, height and orientation of an image, as `jpeg_header.Geometry`.
GEOMETRY_TYPE = pa.list_(pa.int32(), 3)
FINGERPRINT_TYPE = pa.binary(16)
RESERVED = frozenset(
    {KEY, MODALITY, FINGERPRINT, EMBEDDING, ENGINE_ID, SOURCE_FILE, SOURCE_ROW, IMAGE, IMAGE_URI}
    | {TEXT, VERSION, PIXELS, ENCODED, GEOMETRY, STAGE, REASON, DETAIL, *WANTED.values()}
)


class Stage(StrEnum):
    """Where a row was rejected."""

    PLAN = "plan"
    DECODE = "decode"
    ENCODE = "encode"


class Reason(StrEnum):
    """Why a row was rejected, besides the reasons that `engine.images` gives."""

    NULL_KEY = "null_key"
    DUPLICATE_KEY = "duplicate_key"
    NULL_IMAGE = "null_image"
    FETCH_FAILED = "fetch_failed"
    FETCH_REFUSED = "fetch_refused"
    NULL_TEXT = "null_text"
    EMPTY_TEXT = "empty_text"
    TEXT_TOO_LONG = "text_too_long"
    INVALID_TEXT = "invalid_text"
    NOT_ENCODABLE = "not_encodable"
    POISON = "poison"


# The closed set of what `reason` may be.
REASONS = frozenset({reason.value for reason in Reason} | {str(reason) for reason in IMAGE_REASONS})

# What the cells of the catalog alone decide; whole rows are judged anew each time.
_SETTLED_REASONS = frozenset(
    {
        Reason.NULL_KEY.value,
        Reason.DUPLICATE_KEY.value,
        Reason.NULL_IMAGE.value,
        Reason.NULL_TEXT.value,
        Reason.EMPTY_TEXT.value,
        Reason.INVALID_TEXT.value,
    }
)
# What another try may heal: a URI gives something else by now, a limit or a library is another.
RETRYABLE_REASONS = REASONS - _SETTLED_REASONS


def embeddings_schema(
    *,
    key_type: pa.DataType,
    embedding_dim: int,
    dtype: EmbeddingDtype,
    carried: Sequence[pa.Field] = (),
) -> pa.Schema:
    """One row for each embedding; `embedding` has unit norm (to float16 rounding if that).

    Args:
        key_type: string or int64.
        embedding_dim: D.
        dtype: Of the embedding's elements.
        carried: Columns of the catalog that are passed through.
    """
    element = pa.float32() if dtype == "float32" else pa.float16()
    return pa.schema(
        [
            pa.field(KEY, key_type, nullable=False),
            pa.field(MODALITY, pa.string(), nullable=False),
            pa.field(EMBEDDING, pa.list_(pa.field("element", element), embedding_dim)),
            pa.field(FINGERPRINT, FINGERPRINT_TYPE),
            pa.field(ENGINE_ID, pa.string(), nullable=False),
            *carried,
        ]
    )


def rejects_schema(*, key_type: pa.DataType) -> pa.Schema:
    """One row for each row that could not be embedded.

    `key` is null for a null key, `modality` is null where the row was rejected as a whole.
    """
    return pa.schema(
        [
            pa.field(KEY, key_type),
            pa.field(MODALITY, pa.string()),
            pa.field(STAGE, pa.string(), nullable=False),
            pa.field(REASON, pa.string(), nullable=False),
            pa.field(DETAIL, pa.string()),
            pa.field(SOURCE_FILE, pa.string(), nullable=False),
            pa.field(SOURCE_ROW, pa.int64(), nullable=False),
            pa.field(FINGERPRINT, FINGERPRINT_TYPE),
        ]
    )
