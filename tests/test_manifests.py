"""Tests of pipelines/manifests.py."""

import json
from dataclasses import dataclass
from functools import partial

import pytest

from pipelines.errors import StoreError
from pipelines.manifests import UnknownFieldError, from_record, read_manifest
from pipelines.store import Store


@dataclass(frozen=True)
class Lamp:
    """Something to describe."""

    colour: str
    watts: int = 5


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


def read(store: Store, content: bytes) -> Lamp:
    store.publish("lamp.json", content)
    return read_manifest(
        store,
        "lamp.json",
        format_version=2,
        build=partial(from_record, Lamp),
        way_out="buy another",
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_manifest_of_a_known_format_is_read(store, version):
    content = json.dumps({"format_version": version, "colour": "red"}).encode()
    assert read(store, content) == Lamp("red")


def test_a_newer_format_is_refused_whatever_it_holds(store):
    content = json.dumps({"format_version": 3, "shape": "round"}).encode()
    with pytest.raises(
        StoreError, match=r"lamp\.json is of format 3, this Clipmill reads 2; upgrade"
    ):
        read(store, content)


def test_a_field_that_is_not_known_is_of_a_newer_clipmill(store):
    content = json.dumps({"format_version": 2, "shape": "round"}).encode()
    with pytest.raises(StoreError, match=r"written by a newer Clipmill.* field 'shape'; upgrade"):
        read(store, content)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"1", b"{}", b"\xff", b'{"format_version": 2}', b'{"format_version": "a"}'],
)
def test_what_is_damaged_is_named_with_the_way_out(store, content):
    with pytest.raises(StoreError, match=r"lamp\.json is damaged \(.*\); buy another"):
        read(store, content)


def test_a_record_holds_the_fields_of_its_dataclass():
    assert from_record(Lamp, {"colour": "red", "watts": 7}) == Lamp("red", 7)
    with pytest.raises(UnknownFieldError, match=r"^shape$"):
        from_record(Lamp, {"colour": "red", "shape": "round"})
    with pytest.raises(TypeError, match="colour"):
        from_record(Lamp, {})
    with pytest.raises(AttributeError):
        from_record(Lamp, [])  # type: ignore[arg-type]
