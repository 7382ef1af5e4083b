"""Engines are built once, published whole, and anew when damaged; killed builders hinder none."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from engine.checkpoint import Checkpoint, find_checkpoint
from engine.errors import CheckpointError, EngineError
from engine.manifest import Manifest, file_digest, read_manifest, verify_files
from engine.registry import default_engines_dir, engine_id_of, find_engine, load_or_build
from tests.checkpoints import EMBEDDING_DIM, MAX_TOKENS, save_clip, save_image_only

REPOSITORY_DIR = Path(__file__).resolve().parents[1]

# Says when it could start, then asks, and writes a line to a log for each engine that it builds.
ASK = """
import sys
from pathlib import Path
from engine import registry
from engine.checkpoint import find_checkpoint

checkpoint_dir, engines_dir, log = sys.argv[1:]
build = registry._build

def logged(*args, **options):
    with open(log, "a") as file:
        file.write("built\\n")
    return build(*args, **options)

registry._build = logged
print("ready", flush=True)
sys.stdin.readline()
found = registry.load_or_build(find_checkpoint(checkpoint_dir), engines_dir=Path(engines_dir))
print(found.engine_id)
"""

# Stops for good in the middle of a build.
BUILD_HALF = """
import sys, time
from pathlib import Path
import engine.export
from engine import registry
from engine.checkpoint import find_checkpoint

def half(tower, *, path):
    path.write_bytes(b"half")
    print("half", flush=True)
    time.sleep(600)

engine.export.export_text_tower = half
checkpoint_dir, engines_dir = sys.argv[1:]
registry.load_or_build(find_checkpoint(checkpoint_dir), engines_dir=Path(engines_dir))
"""


@contextmanager
def python(script: str, *arguments: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=REPOSITORY_DIR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return find_checkpoint(str(save_clip(tmp_path_factory.mktemp("clip"))))


@pytest.fixture(scope="module")
def built_dir(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("built")
    load_or_build(checkpoint, engines_dir=directory)
    return directory


@pytest.fixture
def engines_dir(built_dir: Path, tmp_path: Path) -> Path:
    """A copy of a folder with one engine, to damage."""
    return shutil.copytree(built_dir, tmp_path / "engines")


def assert_whole(manifest: Manifest, engines_dir: Path) -> None:
    directory = engines_dir / manifest.engine_id
    assert read_manifest(directory) == manifest
    verify_files(manifest, directory)
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        [*manifest.files, "manifest.json"]
    )
    # Nothing but the lock lies beside it.
    assert {path.name for path in engines_dir.iterdir()} == {
        manifest.engine_id,
        f".{manifest.engine_id}.lock",
    }


def test_published_engine_is_complete(checkpoint: Checkpoint, built_dir: Path) -> None:
    manifest = find_engine(engine_id_of(checkpoint), engines_dir=built_dir)
    assert manifest is not None
    assert_whole(manifest, built_dir)
    assert set(manifest.files) == {"image.onnx", "text.onnx", "tokenizer.json"}
    assert manifest.engine_id == engine_id_of(checkpoint)
    assert manifest.checkpoint == checkpoint.name
    assert manifest.checkpoint_digest == checkpoint.digest
    assert manifest.precision == "fp32"
    assert manifest.embedding_dim == EMBEDDING_DIM
    assert manifest.text is not None
    assert manifest.text.max_tokens == MAX_TOKENS
    assert set(manifest.versions) == {"clipmill", "torch", "transformers", "onnx"}


def test_other_users_may_read_it(checkpoint: Checkpoint, built_dir: Path) -> None:
    directory = built_dir / engine_id_of(checkpoint)
    assert directory.stat().st_mode & 0o777 == 0o755


def test_image_only_engine_has_no_text(tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(save_image_only(tmp_path / "checkpoint")))
    manifest = load_or_build(checkpoint, engines_dir=tmp_path / "engines")
    assert_whole(manifest, tmp_path / "engines")
    assert set(manifest.files) == {"image.onnx"}
    assert manifest.text is None


def test_built_engine_is_found_again(checkpoint: Checkpoint, engines_dir: Path) -> None:
    path = engines_dir / engine_id_of(checkpoint) / "image.onnx"
    before = path.stat()
    load_or_build(checkpoint, engines_dir=engines_dir)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_one_of_four_processes_builds(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engines_dir, log = tmp_path / "engines", tmp_path / "log"
    with ExitStack() as stack:
        askers = [
            stack.enter_context(python(ASK, checkpoint.directory, engines_dir, log))
            for _ in range(4)
        ]
        assert [line_of(asker) for asker in askers] == ["ready"] * 4
        for asker in askers:
            assert asker.stdin is not None
            asker.stdin.write("\n")
            asker.stdin.flush()
        answers = [line_of(asker) for asker in askers]
        assert [asker.wait() for asker in askers] == [0] * 4
    assert answers == [engine_id_of(checkpoint)] * 4
    assert log.read_text() == "built\n"
    assert_whole(read_manifest(engines_dir / answers[0]), engines_dir)


def test_killed_builder_hinders_nobody(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine_id = engine_id_of(checkpoint)
    with python(BUILD_HALF, checkpoint.directory, tmp_path) as builder:
        assert line_of(builder) == "half"
        builder.kill()
        builder.wait()
    assert len(list(tmp_path.glob(f".{engine_id}.building-*/text.onnx"))) == 1
    assert find_engine(engine_id, engines_dir=tmp_path) is None
    assert_whole(load_or_build(checkpoint, engines_dir=tmp_path), tmp_path)


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    directory, engines_dir = save_clip(tmp_path / "checkpoint"), tmp_path / "engines"
    (directory / "tokenizer.json").write_text("{")
    checkpoint = find_checkpoint(str(directory))
    with pytest.raises(CheckpointError, match="malformed tokenizer"):
        load_or_build(checkpoint, engines_dir=engines_dir)
    assert [path.name for path in engines_dir.iterdir()] == [f".{engine_id_of(checkpoint)}.lock"]


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json"])
def test_a_flipped_byte_is_found(checkpoint: Checkpoint, engines_dir: Path, name: str) -> None:
    path = engines_dir / engine_id_of(checkpoint) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert find_engine(engine_id_of(checkpoint), engines_dir=engines_dir) is None


def test_damaged_engine_is_built_anew(checkpoint: Checkpoint, engines_dir: Path) -> None:
    path = engines_dir / engine_id_of(checkpoint) / "image.onnx"
    whole = file_digest(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    manifest = load_or_build(checkpoint, engines_dir=engines_dir)
    assert_whole(manifest, engines_dir)
    assert file_digest(path) == whole


def test_engine_without_a_manifest_is_built_anew(checkpoint: Checkpoint, engines_dir: Path) -> None:
    (engines_dir / engine_id_of(checkpoint) / "manifest.json").unlink()
    assert find_engine(engine_id_of(checkpoint), engines_dir=engines_dir) is None
    assert_whole(load_or_build(checkpoint, engines_dir=engines_dir), engines_dir)


def test_folder_that_cannot_be_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engines_dir = tmp_path / "file" / "engines"
    with pytest.raises(EngineError) as caught:
        load_or_build(checkpoint, engines_dir=engines_dir)
    for part in (str(engines_dir), "cannot be written", "--engines or $CLIPMILL_ENGINES"):
        assert part in str(caught.value)


def test_engine_that_is_not_there(tmp_path: Path) -> None:
    assert find_engine("fp32-0011223344556677", engines_dir=tmp_path) is None
    (tmp_path / "file").write_text("")
    assert find_engine("fp32-0011223344556677", engines_dir=tmp_path / "file" / "engines") is None


def test_engine_id_depends_on_content_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine_id = engine_id_of(checkpoint)
    copied = shutil.copytree(checkpoint.directory, tmp_path / "copy")
    (copied / "README.md").write_text("# A copy")
    assert engine_id_of(find_checkpoint(str(copied))) == engine_id
    again = save_clip(tmp_path / "again")
    assert engine_id_of(find_checkpoint(str(again))) == engine_id
    other = save_clip(tmp_path / "other", seed=1)
    assert engine_id_of(find_checkpoint(str(other))) != engine_id
    assert engine_id.startswith("fp32-")
    assert len(bytes.fromhex(engine_id.removeprefix("fp32-"))) == 8


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CLIPMILL_ENGINES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_engines_dir() == tmp_path / "clipmill" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_engines_dir() == Path(os.path.expanduser("~/.cache/clipmill/engines"))
    monkeypatch.setenv("CLIPMILL_ENGINES", str(tmp_path / "named"))
    assert default_engines_dir() == tmp_path / "named"
