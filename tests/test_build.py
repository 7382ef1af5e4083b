"""Engines built from a checkpoint alone: complete, named by content, the same each time."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.build import engine_id_of, load_or_build, unquantized_precision
from engine.checkpoint import Checkpoint, find_checkpoint
from engine.errors import CheckpointError
from engine.manifest import file_digest
from engine.registry import Engine, Registry
from tests.checkpoints import EMBEDDING_DIM, IMAGE_SIZE, MAX_TOKENS, save_clip, save_image_only
from tests.engines import flip_byte


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return find_checkpoint(str(save_clip(tmp_path_factory.mktemp("clip"))))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(str(tmp_path_factory.mktemp("engines")))


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, registry: Registry) -> Engine:
    return load_or_build(checkpoint, registry=registry)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_an_engine_is_complete(checkpoint: Checkpoint, registry: Registry, engine: Engine):
    manifest = engine.manifest
    assert registry.find(engine_id_of(checkpoint)) == engine
    assert set(manifest.files) == {"image.onnx", "text.onnx", "tokenizer.json"}
    assert names(engine.directory) == {*manifest.files, "manifest.json"}
    assert manifest.engine_id == engine_id_of(checkpoint)
    assert manifest.checkpoint == checkpoint.name
    assert manifest.checkpoint_digest == checkpoint.digest
    assert manifest.precision == "fp32"
    assert manifest.embedding_dim == EMBEDDING_DIM
    assert manifest.text is not None
    assert manifest.text.max_tokens == MAX_TOKENS
    assert set(manifest.versions) == {"clipmill", "torch", "transformers", "onnx"}


def test_it_is_built_once(checkpoint: Checkpoint, registry: Registry, engine: Engine):
    before = (engine.directory / "image.onnx").stat()
    assert load_or_build(checkpoint, registry=registry) == engine
    after = (engine.directory / "image.onnx").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_built_anew_it_is_the_same(checkpoint: Checkpoint, engine: Engine, tmp_path: Path):
    shutil.copytree(engine.directory, tmp_path / engine.directory.name)
    flip_byte(tmp_path / engine.directory.name / "image.onnx")
    again = load_or_build(checkpoint, registry=Registry(str(tmp_path)))
    assert again.directory == tmp_path / engine.directory.name
    assert again.manifest == engine.manifest
    for name, digest in engine.manifest.files.items():
        assert file_digest(again.directory / name) == digest


def test_an_engine_of_16_bit_is_another_one_and_half_as_large(
    checkpoint: Checkpoint, registry: Registry, engine: Engine
):
    half = load_or_build(checkpoint, registry=registry, precision="fp16")
    assert half.manifest.precision == "fp16"
    assert half.manifest.engine_id == engine_id_of(checkpoint, precision="fp16")
    assert half.manifest.engine_id.startswith("fp16-")
    sizes = [(found.directory / "image.onnx").stat().st_size for found in (half, engine)]
    assert sizes[0] < 0.8 * sizes[1]  # the graph itself stays as large, and the model is tiny
    pixels = np.random.default_rng(0).integers(0, 256, (4, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    texts = ["a red circle", "two squares", "", "a"]
    encoders = [OnnxCpuEncoder(found.directory, num_threads=1) for found in (half, engine)]
    for one, other in (
        [encoder.encode_images(pixels) for encoder in encoders],
        [encoder.encode_texts(texts) for encoder in encoders],
    ):
        assert not np.array_equal(one, other)
        assert np.sum(one * other, axis=1).min() > 0.999


def test_an_image_only_engine_has_no_text(tmp_path: Path):
    checkpoint = find_checkpoint(str(save_image_only(tmp_path / "checkpoint")))
    engine = load_or_build(checkpoint, registry=Registry(str(tmp_path / "engines")))
    assert set(engine.manifest.files) == {"image.onnx"}
    assert names(engine.directory) == {"image.onnx", "manifest.json"}
    assert engine.manifest.text is None


def test_a_checkpoint_that_cannot_be_built_from_leaves_nothing(tmp_path: Path):
    directory = save_clip(tmp_path / "checkpoint")
    (directory / "tokenizer.json").write_text("{")
    registry = Registry(str(tmp_path / "engines"))
    with pytest.raises(CheckpointError, match="malformed tokenizer"):
        load_or_build(find_checkpoint(str(directory)), registry=registry)
    assert registry.local.folders("") == []
    assert registry.local.leftovers() == {}


def test_an_id_depends_on_content_alone(checkpoint: Checkpoint, tmp_path: Path):
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


def test_an_id_depends_on_all_that_makes_the_output(checkpoint: Checkpoint):
    ids = {
        engine_id_of(checkpoint),
        engine_id_of(checkpoint, precision="fp16"),
        engine_id_of(checkpoint, precision="fp8"),
        engine_id_of(checkpoint, precision="fp8", recipe="max 0123"),
        engine_id_of(checkpoint, precision="fp8", recipe="max 4567"),
    }
    assert len(ids) == 5


def test_an_id_says_whether_a_checkpoint_is_enough():
    found = {name: unquantized_precision(f"{name}-0123") for name in ("fp32", "fp16", "fp8", "x")}
    assert found == {"fp32": "fp32", "fp16": "fp16", "fp8": None, "x": None}
