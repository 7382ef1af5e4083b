"""Artifacts of one node: checked, put in place whole, locked, cleaned up."""

import json
import logging
import os
from pathlib import Path

import pytest

from engine.errors import DamagedError, EngineError
from engine.publishing.artifacts import Artifact, LocalArtifacts, listed_files
from tests.engines import flip_byte, write_plan

ARTIFACT = Artifact(path="engine/plans/plan", record="plan.json")
NAMESAKE = Artifact(path="engine/plans/plan.2", record="plan.json")


@pytest.fixture
def local(tmp_path: Path) -> LocalArtifacts:
    return LocalArtifacts(tmp_path / "engines", way_out="ask the librarian")


def publish(local: LocalArtifacts, artifact: Artifact = ARTIFACT, content: bytes = b"plan") -> Path:
    with local.lock(artifact), local.building(artifact) as building:
        local.fill(building, artifact, write=lambda path: write_plan(path, content=content))
        return local.publish(artifact, building)


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def test_what_is_published_is_whole_and_nothing_else_is_left(local: LocalArtifacts):
    assert local.find(ARTIFACT) is None
    directory = publish(local)
    assert directory == local.directory / ARTIFACT.path == local.find(ARTIFACT)
    assert names(directory) == {"plan.json", "image.plan"}
    assert directory.stat().st_mode & 0o777 == 0o755  # other users may read it
    assert local.leftovers() == {}


def test_what_is_whole_already_stays(local: LocalArtifacts):
    publish(local, content=b"first")
    directory = publish(local, content=b"second")
    assert (directory / "image.plan").read_bytes() == b"first"
    assert local.leftovers() == {}


@pytest.mark.parametrize("name", ["image.plan", "plan.json"])
def test_a_flipped_byte_is_said_and_gives_way(
    local: LocalArtifacts, name: str, caplog: pytest.LogCaptureFixture
):
    directory = publish(local)
    flip_byte(directory / name)
    with caplog.at_level(logging.WARNING):
        assert local.find(ARTIFACT) is None
    assert "engine/plans/plan is damaged and not used" in caplog.text
    publish(local, content=b"second")
    assert (directory / "image.plan").read_bytes() == b"second"
    assert local.leftovers() == {}


def test_a_folder_without_its_record_is_not_there_and_gives_way(local: LocalArtifacts):
    directory = local.directory / ARTIFACT.path
    directory.mkdir(parents=True)
    (directory / "image.plan").write_bytes(b"half")
    assert local.find(ARTIFACT) is None
    assert (publish(local) / "image.plan").read_bytes() == b"plan"


def test_a_builder_that_fails_leaves_nothing(local: LocalArtifacts):
    def fail(directory: Path) -> None:
        write_plan(directory)
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        local.lock(ARTIFACT),
        local.building(ARTIFACT) as building,
    ):
        local.fill(building, ARTIFACT, write=fail)
    assert local.find(ARTIFACT) is None
    assert local.leftovers() == {}


def test_a_builder_that_forgets_a_file_or_a_record_publishes_nothing(local: LocalArtifacts):
    def forget(name: str):
        def write(directory: Path) -> None:
            write_plan(directory)
            (directory / name).unlink()

        return write

    for name in ("image.plan", "plan.json"):
        with (
            pytest.raises(DamagedError, match=f"{name} is missing"),
            local.lock(ARTIFACT),
            local.building(ARTIFACT) as building,
        ):
            local.fill(building, ARTIFACT, write=forget(name))


def test_a_full_disk_is_an_error_with_a_way_out(local: LocalArtifacts):
    def write(directory: Path) -> None:
        (directory / "image.plan").write_bytes(b"")
        raise OSError(28, os.strerror(28))

    with (
        pytest.raises(EngineError, match=r"No space left on device.*ask the librarian"),
        local.lock(ARTIFACT),
        local.building(ARTIFACT) as building,
    ):
        local.fill(building, ARTIFACT, write=write)


def test_a_folder_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path: Path):
    (tmp_path / "file").write_text("")
    local = LocalArtifacts(tmp_path / "file" / "engines", way_out="ask the librarian")
    assert local.find(ARTIFACT) is None
    with pytest.raises(EngineError, match=r"file/engines cannot be written.*ask"):
        publish(local)
    local = LocalArtifacts(tmp_path, way_out="ask the librarian")
    (tmp_path / "engine" / "plans").mkdir(parents=True)
    (tmp_path / ARTIFACT.path).write_text("a file in the place of the folder")
    with pytest.raises(EngineError, match="cannot be written"):
        publish(local)


def test_what_killed_builders_left_is_found_and_goes_with_the_next(local: LocalArtifacts):
    publish(local, NAMESAKE)
    other, own = (local.directory / ".building" / name for name in ("other", "engine+plans+plan"))
    for workspace in (own, other):
        (workspace / "tmp123").mkdir(parents=True)
        (workspace / "tmp123" / "image.plan").write_bytes(b"half")
    assert local.leftovers() == {own / "tmp123": ARTIFACT.path, other / "tmp123": "other"}
    publish(local)
    assert local.leftovers() == {other / "tmp123": "other"}


def test_a_place_is_idle_unless_someone_builds_in_it(local: LocalArtifacts):
    def idle(path: str) -> bool:
        with local.idle(path) as found:
            return found

    assert idle("engine")
    with local.lock(ARTIFACT):
        assert not idle("engine")
        assert not idle(ARTIFACT.path)
        assert idle(NAMESAKE.path)
        assert idle("engine2")
    assert idle("engine")
    with local.idle("engine") as first:  # locks out all who have built there
        assert first
        assert not idle("engine")
        assert not idle(ARTIFACT.path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"files": ["a"]}', b'{"files": null}', b"\xff"]
)
def test_a_malformed_record_is_damage(content: bytes):
    with pytest.raises(DamagedError, match="where: damaged"):
        listed_files(content, "where")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_record_names_no_file_outside_its_folder(name: str):
    record = json.dumps({"files": {name: "0" * 64}}).encode()
    with pytest.raises(DamagedError, match="a file named"):
        ARTIFACT.files(record, path="where")
