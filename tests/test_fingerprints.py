"""Tests of pipelines/fingerprints.py."""

from typing import Any

import pyarrow as pa
import pytest
import xxhash

from pipelines.fingerprints import index_id, plan_id, row_fingerprints
from pipelines.schema import Modality


def rows(**columns: list[Any]) -> pa.Table:
    types = {"image": pa.large_binary(), "image_uri": pa.binary(), "text": pa.binary()}
    types |= {"version": pa.string()}
    num_rows = len(next(iter(columns.values())))
    columns.setdefault("key", [f"k{row}" for row in range(num_rows)])
    if "image" in columns or "image_uri" in columns:
        columns.setdefault("image", [None] * num_rows)
        columns.setdefault("image_uri", [None] * num_rows)
    return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})


def prints(modality: Modality, **columns: list[Any]) -> list[bytes | None]:
    array = row_fingerprints(rows(**columns), modality=modality)
    assert array.type == pa.binary(16)
    return array.to_pylist()


def test_the_hash_is_that_of_the_content_and_stays_so():
    # A store on disk holds these: another hash would embed every row again.
    assert prints("text", text=["ein Stück"]) == [xxhash.xxh3_128_digest("ein Stück".encode())]
    assert prints("image", image=[b"\xff\xd8"]) == [xxhash.xxh3_128_digest(b"\xff\xd8")]
    assert xxhash.xxh3_128_hexdigest(b"") == "99aa06d3014798d86001c324468d497f"


@pytest.mark.parametrize(
    ("modality", "contents"),
    [
        ("text", ["same", "same", "Same", "", None]),
        ("image", [b"same", b"same", b"Same", b"", None]),
    ],
)
def test_equal_contents_have_equal_fingerprints_whatever_the_key(modality, contents):
    same, again, other, empty, missing = prints(modality, **{modality: contents})
    assert same == again
    assert len({same, other, empty}) == 3
    assert missing is None


def test_an_image_counts_by_its_bytes_and_without_them_by_its_uri():
    both, without_uri, uri, other_uri, neither = prints(
        "image",
        image=[b"bytes", b"bytes", None, None, None],
        image_uri=["a.jpg", None, "a.jpg", "b.jpg", None],
    )
    assert both == without_uri
    assert len({both, uri, other_uri}) == 3
    assert neither is None


def test_a_uri_is_not_taken_for_bytes_of_the_same_letters():
    as_bytes, as_uri = prints("image", image=[b"a.jpg", None], image_uri=[None, "a.jpg"])
    assert as_bytes != as_uri
    assert as_uri == xxhash.xxh3_128_digest(b"uri\0a.jpg")


@pytest.mark.parametrize("modality", ["image", "text"])
def test_with_a_version_only_key_and_version_count(modality):
    first, same, other_key, other_version, no_version, empty_version = prints(
        modality,
        key=["a", "a", "b", "a", "a", "a"],
        version=["1", "1", "1", "2", None, ""],
        text=["x", "y", "x", "x", "x", "x"],
        image=[b"x", b"y", b"x", b"x", b"x", None],
    )
    assert first == same
    assert len({first, other_key, other_version, no_version, empty_version}) == 5


def test_with_a_version_content_need_not_be_read():
    assert prints("text", key=[1], version=["1"]) != prints("image", key=[1], version=["1"])


def test_no_rows_have_no_fingerprints():
    assert prints("text", text=[]) == []


def test_a_plan_is_named_by_its_parts_in_their_order():
    assert plan_id(["a", "b"]) == plan_id(("a", "b"))
    assert len({plan_id(parts) for parts in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5
    assert len(plan_id(["a"])) == 16
    assert int(plan_id(["a"]), 16) >= 0


def test_an_index_is_named_for_its_parts_in_order():
    assert index_id(["a", "b"]) == index_id(("a", "b"))
    assert len({index_id(parts) for parts in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5
    assert len(index_id(["a"])) == 32
    assert int(index_id(["a"]), 16) >= 0
