"""Artifacts on a root that all nodes reach: fetched whole, published once, mended."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import DamagedError, EngineError
from engine.publishing.artifacts import Artifact
from engine.publishing.folders import Folder
from engine.publishing.remote import missing_files, pull, push, read_record
from engine.registry import engine_artifact
from tests.engines import FP32_ID, write_engine
from tests.object_store import s3_bucket

ENGINE = engine_artifact(FP32_ID)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    uri = f"memory://{tmp_path.name}/engines"
    if request.param == "s3":
        uri = f"{request.getfixturevalue('bucket')}/{tmp_path.name}/engines"
    return Folder(uri, called="engines", error=EngineError)


def built(directory: Path, content: bytes = b"graph") -> Path:
    directory.mkdir()
    write_engine(directory, content=content)
    return directory


def fetched(root: Folder, directory: Path, artifact: Artifact = ENGINE) -> Path:
    record = read_record(root, artifact)
    assert record is not None
    directory.mkdir()
    pull(root, artifact, record=record, into=directory)
    return directory


def content_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_what_is_fetched_is_what_was_published(root: Folder, tmp_path: Path):
    assert read_record(root, ENGINE) is None
    directory = built(tmp_path / "built")
    assert push(root, ENGINE, directory, damaged=None)
    assert content_of(fetched(root, tmp_path / "fetched")) == content_of(directory)
    assert root.names(FP32_ID) == ["files", "manifest.json"]


def test_of_two_builders_the_first_one_counts(root: Folder, tmp_path: Path):
    first, second = built(tmp_path / "1", b"first"), built(tmp_path / "2", b"second")
    assert push(root, ENGINE, first, damaged=None)
    assert not push(root, ENGINE, second, damaged=None)
    assert content_of(fetched(root, tmp_path / "fetched")) == content_of(first)


def test_a_builder_that_uploads_in_the_middle_of_another_does_no_harm(root: Folder, tmp_path: Path):
    first, second = built(tmp_path / "1", b"first"), built(tmp_path / "2", b"second")

    class Overtaken(Folder):
        """Another builder begins and ends before the record is created."""

        def create(self, relative: str, content: bytes) -> None:
            assert push(root, ENGINE, second, damaged=None)
            super().create(relative, content)

    overtaken = Overtaken(root.uri, called="engines", error=EngineError)
    assert not push(overtaken, ENGINE, first, damaged=None)
    assert content_of(fetched(root, tmp_path / "fetched")) == content_of(second)


def test_files_without_a_record_are_not_there(root: Folder, tmp_path: Path):
    class Killed(Folder):
        def create(self, relative: str, content: bytes) -> None:
            raise KeyboardInterrupt

    killed = Killed(root.uri, called="engines", error=EngineError)
    with pytest.raises(KeyboardInterrupt):
        push(killed, ENGINE, built(tmp_path / "1", b"first"), damaged=None)
    assert root.names(f"{FP32_ID}/files") != []
    assert read_record(root, ENGINE) is None
    second = built(tmp_path / "2", b"second")
    assert push(root, ENGINE, second, damaged=None)
    assert content_of(fetched(root, tmp_path / "fetched")) == content_of(second)


def test_a_missing_file_is_damage(root: Folder, tmp_path: Path):
    push(root, ENGINE, built(tmp_path / "built"), damaged=None)
    record = read_record(root, ENGINE)
    assert record is not None
    assert missing_files(root, ENGINE, record) == []
    root.remove(f"{FP32_ID}/files/{root.names(f'{FP32_ID}/files')[0]}")
    missing = missing_files(root, ENGINE, record)
    assert len(missing) == 1
    with pytest.raises(DamagedError, match=f"{FP32_ID}/manifest.json: {missing[0]} is missing"):
        fetched(root, tmp_path / "fetched")


def test_a_damaged_one_is_replaced_with_what_was_made_from_it(root: Folder, tmp_path: Path):
    push(root, ENGINE, built(tmp_path / "1", b"first"), damaged=None)
    damaged = read_record(root, ENGINE)
    root.publish(f"{FP32_ID}/plans/plan/plan.json", b"{}")
    second = built(tmp_path / "2", b"second")
    assert push(root, ENGINE, second, damaged=damaged)
    assert content_of(fetched(root, tmp_path / "fetched")) == content_of(second)
    assert root.names(FP32_ID) == ["files", "manifest.json"]
    # Another node saw the damage, too, and is late.
    third = built(tmp_path / "3", b"third")
    assert not push(root, ENGINE, third, damaged=damaged)
    assert content_of(fetched(root, tmp_path / "again")) == content_of(second)
