"""Tests of pipelines/store_places.py: one store, one name, and no secret in it."""

import os
import re

import pytest

from pipelines.store_places import (
    absolute_uri,
    is_read_with,
    store_digest,
    store_label,
    store_place,
)

SAME = {
    "s3://bucket/products/vectors": (
        "s3://bucket/products/vectors/",
        "s3a://bucket/products/vectors",
        "S3://key:secret@bucket/products/vectors",
        "s3://bucket/products/vectors?sig=secret#now",
        "s3://key:se/cr@et@bucket/products/vectors/?sig=secret",
    ),
    "/data/stores/vectors": (
        "file:///data/stores/vectors",
        "local:///data/stores/vectors/",
        "/data//stores/./vectors",
        "/data/stores/other/../vectors",
    ),
    "abfs://bucket/vectors": ("az://bucket/vectors", "abfss://bucket/vectors/"),
    "gs://bucket": ("gcs://bucket/",),
}


@pytest.mark.parametrize(
    ("place", "uri"), [(place, uri) for place, uris in SAME.items() for uri in (place, *uris)]
)
def test_a_place_has_one_name(place: str, uri: str):
    assert store_place(uri) == place
    assert store_digest(uri) == store_digest(place)
    assert store_label(uri) == store_label(place)


def test_other_places_have_other_names():
    uris = [
        *SAME,
        "s3://other/products/vectors",
        "s3://bucket/more/products/vectors",
        "gs://bucket/products/vectors",
        "abfs://one@account.dfs.core.windows.net/products/vectors",
        "abfs://two@account.dfs.core.windows.net/products/vectors",
        "hdfs://one:8020/teams/a@corp/vectors",
        "hdfs://one:8020/teams/b@corp/vectors",
        "hdfs://two:8020/teams/b@corp/vectors",
        "/products/vectors",
        *(f"/{'x' * 200}{number}" for number in range(2)),
    ]
    assert len({store_place(uri) for uri in uris}) == len(uris)
    labels = {store_label(uri) for uri in uris}
    assert len(labels) == len(uris)
    assert all(len(label) <= 80 for label in labels)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://key:secret@bucket/products/vectors/", "products/vectors"),
        ("s3://bucket", "bucket"),
        ("abfs://bucket/a/vectors?sas=secret", "a/vectors"),
        ("/data/stores/vectors", "stores/vectors"),
        ("memory://", "root"),
        ("/" + "x" * 200, "x" * 71),
        ("/data/stoß/snü", "sto%C3%9F/sn%C3%BC"),
        ("/data/\udcff", "data/%FF"),
    ],
)
def test_a_label_begins_with_what_people_know(uri: str, name: str):
    label = store_label(uri)
    assert re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{8}}", label)
    assert "secret" not in label


def test_a_relative_path_is_that_of_here():
    assert store_place("vectors") == os.path.join(os.getcwd(), "vectors")
    assert store_label("vectors") == store_label(os.path.abspath("vectors"))


def test_a_path_is_absolute_however_it_is_written():
    here = os.getcwd()
    for uri in ("a", "./a", f"{here}/a/"):
        assert absolute_uri(uri) == f"{here}/a"
    for uri in ("s3://bucket/a/", "file:/a", "file://~/a"):
        assert absolute_uri(uri) == uri


def test_a_place_that_is_read_with_a_folder():
    assert is_read_with("a/b", "a")
    assert is_read_with(os.path.abspath("a"), "./a/")
    assert is_read_with("s3a://bucket/a/b/c", "s3://bucket/a")
    assert not is_read_with("a/_vectors", "a")
    assert not is_read_with("s3://bucket/a/.clipmill/b", "s3://bucket/a")
    assert is_read_with("/x/_a/b", "/x/_a")
    assert not is_read_with("a", "a/b")
    assert not is_read_with("ab", "a")
    assert not is_read_with("s3://bucket/a", "/bucket")
