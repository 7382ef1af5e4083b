"""What requests and answers look like: the JSON that the API document describes.

Knows nothing of how queries are answered.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from pipelines.errors import QueryError
from pipelines.indexes.filters import Operator
from pipelines.indexes.queries import Part, part_from_json
from pipelines.indexes.shown import shown
from pipelines.schema import Modality

MAX_INT64 = 2**63 - 1
MAX_PARTS = 32
"""Of one query."""
MAX_TEXT_CHARACTERS = 8_000
"""Of a text, all of which is tokenized before it is cut; no engine reads more than a tenth."""
MAX_URL_TEXT_CHARACTERS = 1_000
"""Of a text in an address, which servers bound themselves, at 64 KiB and less."""
MAX_DIM = 8_192
"""Of a vector; no engine gives more."""
MAX_CONDITIONS = 100
MAX_VALUES = 1_000
"""Of a condition's list."""
KeyInt = Annotated[StrictInt, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Scalar = StrictBool | StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)] | StrictStr


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PartBody(_Body):
    """One part of a query: exactly one of text, image, key and vector."""

    text: str | None = Field(
        default=None,
        max_length=MAX_TEXT_CHARACTERS,
        description="What to look for, in words.",
        examples=["a ring"],
    )
    image: str | None = Field(
        default=None,
        description="What to look for, as an encoded JPEG, PNG, WebP, GIF, TIFF or BMP file "
        "in base64.",
    )
    key: KeyInt | StrictStr | None = Field(default=None, description="Something like this item.")
    vector: list[Finite] | None = Field(
        default=None, max_length=MAX_DIM, description="An embedding of the same engine."
    )
    weight: Finite = Field(
        default=1.0, description="How much it counts, not 0; below 0: something unlike it."
    )

    def part(self) -> Part:
        """The part of a query; ValueError for what cannot be asked."""
        return part_from_json(self.model_dump(exclude_none=True))


class QueryBody(_Body):
    """What to look for: the weighted sum of its parts."""

    parts: list[PartBody] = Field(min_length=1, max_length=MAX_PARTS, description="One at least.")


class ConditionBody(_Body):
    """What a carried column of a hit must be."""

    column: str = Field(description="A carried column; GET /columns lists them.")
    operator: Operator = Field(description="`in` takes a list of values.")
    value: Scalar | Annotated[list[Scalar], Field(max_length=MAX_VALUES)] = Field(
        description="To compare with; times as ISO 8601 text."
    )


class SearchBody(_Body):
    """One query, or several with the same conditions."""

    query: QueryBody | None = Field(default=None, description="One query.")
    queries: list[QueryBody] | None = Field(default=None, min_length=1, description="Or several.")
    k: int = Field(default=10, ge=1, description="Hits for each query.")
    where: list[ConditionBody] = Field(
        default=[],
        max_length=MAX_CONDITIONS,
        description="Conditions; all of them hold for every hit.",
    )
    among: Modality | None = Field(
        default=None, description="Which embeddings are searched; images, if there are any."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either `query` or `queries`")
        return self

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "oneOf": [{"required": ["query"]}, {"required": ["queries"]}],
            "examples": [{"query": {"parts": [{"text": "a red ring"}]}, "k": 10}],
        },
    )


class HitBody(BaseModel):
    """One answer."""

    key: int | str = Field(description="Of the catalog.")
    score: float = Field(description="Cosine similarity to the query, -1 to 1.")
    columns: dict[str, Any] = Field(description="Carried columns.")
    item: str = Field(description="Path of the item.")
    thumbnail: str | None = Field(description="Path of its picture; null where there are none.")


class AnswerBody(BaseModel):
    """The hits of one query, best first."""

    hits: list[HitBody]
    notes: list[str] = Field(description="What to know of them, such as that a text was cut.")


class OneAnswerBody(AnswerBody):
    """The answer to one query."""

    snapshot: int = Field(description="That answered.")
    among: Modality = Field(description="The embeddings that were searched.")


class AnswersBody(BaseModel):
    """The answers to several queries, in their order."""

    answers: list[AnswerBody]
    snapshot: int = Field(description="That answered.")
    among: Modality = Field(description="The embeddings that were searched.")


class ItemBody(BaseModel):
    """One item."""

    key: int | str = Field(description="Of the catalog.")
    columns: dict[str, Any] = Field(description="Carried columns.")
    thumbnail: str | None = Field(description="Path of its picture; null where there are none.")
    snapshot: int = Field(description="That it is of.")


class ColumnBody(BaseModel):
    """A carried column."""

    name: str
    type: Literal["string", "integer", "number", "boolean", "time", "other"]


class AmongBody(BaseModel):
    """Embeddings that can be searched."""

    among: Modality
    num_rows: int = Field(description="Rows.")


class ColumnsBody(BaseModel):
    """What can be asked."""

    snapshot: int = Field(description="That answers.")
    created_at: str = Field(description="When it was committed, ISO 8601.")
    key_type: Literal["string", "int64"] = Field(description="Of keys.")
    columns: list[ColumnBody] = Field(description="Carried columns, for `where`.")
    among: list[AmongBody] = Field(description="What can be searched, the default first.")
    thumbnails: Literal["none", "reading", "ready", "failed"] = Field(
        description="Whether there are pictures (yet)."
    )
    max_hits: int = Field(description="Largest k.")
    max_image_bytes: int = Field(description="Largest image in a query, encoded.")


class HealthBody(BaseModel):
    """The process lives."""

    status: Literal["ok"] = "ok"


class ReadyBody(BaseModel):
    """Which snapshot answers."""

    status: Literal["ready"] = "ready"
    snapshot: int = Field(description="That answers.")
    failure: str | None = Field(description="Why a newer one cannot be opened, if one cannot.")
    thumbnails: Literal["none", "reading", "ready", "failed"] = Field(
        description="Whether there are pictures (yet); searching does not need them."
    )


def stored_key(text: str, *, key_is_int: bool) -> str | int:
    """A key that was written as text; QueryError if the store's keys are integers and it is none.

    JSON in a browser loses digits of large integers, so that these come as text as well.
    """
    if not key_is_int:
        return text
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdecimal() and len(digits) <= len(str(MAX_INT64)):
        number = int(text)
        if -MAX_INT64 - 1 <= number <= MAX_INT64:
            return number
    raise QueryError(f"key {shown(text)}: the keys of this store are integers of 64 bits")
