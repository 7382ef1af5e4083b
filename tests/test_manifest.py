"""A manifest survives its file; damage, newer formats and changed files are named."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine.errors import DamagedError, EngineError
from engine.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    TextInput,
    file_digest,
    read_manifest,
    verify_files,
)
from engine.preprocess import Preprocessing

ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

MANIFEST = Manifest(
    engine_id="fp32-0011223344556677",
    checkpoint="some-owner/some-model",
    revision="0123456789abcdef0123456789abcdef01234567",
    checkpoint_digest="ab" * 32,
    precision="fp32",
    embedding_dim=24,
    preprocessing=Preprocessing(
        height=32,
        width=32,
        resize=(40, 36),
        crop=(32, 32),
        resample=3,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        rescale_factor=1 / 255,
    ),
    text=TextInput(max_tokens=16, pad_token_id=640),
    files={"image.onnx": ABC_SHA256, "text.onnx": EMPTY_SHA256},
    versions={"torch": "2.13.0"},
)


def write_files(directory: Path) -> None:
    (directory / "image.onnx").write_bytes(b"abc")
    (directory / "text.onnx").write_bytes(b"")


def error_of(directory: Path) -> str:
    with pytest.raises(EngineError) as caught:
        read_manifest(directory)
    return str(caught.value)


@pytest.mark.parametrize(
    "manifest",
    [
        MANIFEST,
        dataclasses.replace(MANIFEST, text=None, revision=None),
        dataclasses.replace(
            MANIFEST, preprocessing=dataclasses.replace(MANIFEST.preprocessing, resize=36)
        ),
    ],
    ids=["whole", "image-only", "shortest-edge"],
)
def test_round_trip(tmp_path: Path, manifest: Manifest) -> None:
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest


def test_file_names_its_format(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    record = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert record["format_version"] == FORMAT_VERSION
    assert record["engine_id"] == MANIFEST.engine_id


def test_modalities() -> None:
    assert MANIFEST.modalities == ("image", "text")
    assert dataclasses.replace(MANIFEST, text=None).modalities == ("image",)


def test_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    record = json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1, "new": 1}
    path.write_text(json.dumps(record))
    assert f"newer Clipmill (format {FORMAT_VERSION + 1}); upgrade" in error_of(tmp_path)


def test_manifest_is_missing(tmp_path: Path) -> None:
    assert "no engine there (manifest.json is missing)" in error_of(tmp_path)
    assert "no engine there" in error_of(tmp_path / "absent")


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "engine").write_text("")
    assert "no engine there" in error_of(tmp_path / "engine")


def test_manifest_is_cut_short(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    whole = path.read_bytes()
    for num_bytes in (0, 1, 100, len(whole) - 3):
        path.write_bytes(whole[:num_bytes])
        text = error_of(tmp_path)
        assert str(path) in text
        assert "damaged" in text
        assert "the next run builds it anew" in text


@pytest.mark.parametrize("content", ["null", "[]", "{}", '"text"', "\ufffe"])
def test_manifest_is_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    assert "damaged" in error_of(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown": 1},
        {"preprocessing": {"height": 32}},
        {"preprocessing": None},
        {"text": {"max_tokens": 16}},
        {"format_version": "1"},
    ],
    ids=str,
)
def test_manifest_has_other_fields(tmp_path: Path, changes: dict[str, object]) -> None:
    MANIFEST.write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert "damaged" in error_of(tmp_path)


def test_manifest_lacks_a_field(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    whole = json.loads(path.read_text())
    for name in whole:
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        assert name in error_of(tmp_path)


def test_digest_is_sha256(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert file_digest(tmp_path / "image.onnx") == ABC_SHA256
    assert file_digest(tmp_path / "text.onnx") == EMPTY_SHA256


def test_whole_files_are_accepted(tmp_path: Path) -> None:
    write_files(tmp_path)
    verify_files(MANIFEST.files, directory=tmp_path)


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx"])
def test_changed_file_is_named(tmp_path: Path, name: str) -> None:
    write_files(tmp_path)
    (tmp_path / name).write_bytes(b"abd")
    with pytest.raises(DamagedError) as caught:
        verify_files(MANIFEST.files, directory=tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "does not match its checksum" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "text.onnx").unlink()
    with pytest.raises(DamagedError, match=r"text\.onnx is missing"):
        verify_files(MANIFEST.files, directory=tmp_path)


def test_weights_tell_builds_of_an_fp8_engine_apart():
    fp8 = dataclasses.replace(
        MANIFEST, precision="fp8", files={"image.safetensors": "aa", "image.onnx": "bb"}
    )
    for files, is_same in (
        ({"image.onnx": "bb", "image.safetensors": "aa"}, True),
        ({"image.safetensors": "aa", "image.onnx": "cc"}, True),
        ({"image.safetensors": "dd", "image.onnx": "bb"}, False),
        ({"text.safetensors": "aa", "image.onnx": "bb"}, False),
    ):
        other = dataclasses.replace(fp8, files=files)
        assert (other.weights == fp8.weights) == is_same
    assert dataclasses.replace(fp8, precision="fp16").weights is None
