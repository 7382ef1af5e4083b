"""Tests of pipelines/schema.py."""

import pyarrow as pa
import pytest

from pipelines import schema
from pipelines.schema import REASONS, RESERVED, embeddings_schema, rejects_schema


def test_reasons_are_a_closed_set_that_changes_only_on_purpose():
    assert {
        "null_key",
        "duplicate_key",
        "null_image",
        "fetch_failed",
        "fetch_refused",
        "empty_image",
        "not_an_image",
        "truncated_image",
        "image_too_large",
        "unsupported_image",
        "null_text",
        "empty_text",
        "text_too_long",
        "invalid_text",
        "not_encodable",
        "poison",
    } == REASONS


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("key_type", [pa.string(), pa.int64()])
def test_an_embedding_is_a_list_of_fixed_length(dtype, key_type):
    columns = embeddings_schema(key_type=key_type, embedding_dim=7, dtype=dtype)
    embedding = columns.field("embedding").type
    assert embedding.list_size == 7
    assert embedding.value_type == (pa.float32() if dtype == "float32" else pa.float16())
    assert columns.field("key").type == key_type
    assert columns.field("fingerprint").type == pa.binary(16)


def test_carried_columns_come_last_with_their_own_types():
    carried = [pa.field("price", pa.decimal128(9, 2)), pa.field("tags", pa.list_(pa.string()))]
    columns = embeddings_schema(
        key_type=pa.string(), embedding_dim=4, dtype="float32", carried=carried
    )
    assert list(columns)[-2:] == carried


@pytest.mark.parametrize(
    "columns",
    [
        embeddings_schema(key_type=pa.string(), embedding_dim=4, dtype="float32"),
        rejects_schema(key_type=pa.string()),
    ],
    ids=["embeddings", "rejects"],
)
def test_no_carried_column_can_take_the_name_of_our_own(columns):
    assert set(columns.names) <= RESERVED


def test_a_reject_may_lack_key_and_modality_but_not_where_it_came_from():
    columns = rejects_schema(key_type=pa.int64())
    nullable = {field.name for field in columns if field.nullable}
    assert nullable == {"key", "modality", "detail", "fingerprint"}
    assert columns.field("source_row").type == pa.int64()


def test_every_modality_has_its_column_of_what_is_wanted():
    assert tuple(schema.WANTED) == schema.MODALITIES
