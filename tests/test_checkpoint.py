"""Folders and hub ids are found; what is missing or malformed is named; digests follow content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from transformers import AutoTokenizer, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from engine.checkpoint import HUB_PATTERNS, find_checkpoint
from engine.errors import CheckpointError
from tests.checkpoints import save_clip

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def saved_in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("shards"), max_shard_size="40KB")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def shards(saved_in_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_in_shards, tmp_path / "shards")


def error_of(name: Path | str, **options: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(str(name), **options)
    return str(caught.value)


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., str]) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)


def test_folder_is_found(saved: Path) -> None:
    checkpoint = find_checkpoint(str(saved))
    assert checkpoint.name == str(saved)
    assert checkpoint.revision is None
    assert checkpoint.directory == saved.resolve()
    assert checkpoint.model_type == "clip"
    assert checkpoint.weight_paths == [saved.resolve() / "model.safetensors"]
    assert checkpoint.has_tokenizer


def test_shards_are_found_in_order(saved_in_shards: Path) -> None:
    names = [path.name for path in find_checkpoint(str(saved_in_shards)).weight_paths]
    assert len(names) > 1
    assert names == sorted(path.name for path in saved_in_shards.glob("*.safetensors"))


def test_a_folder_has_no_revision(saved: Path) -> None:
    with pytest.raises(ValueError, match="revision 'main': a folder"):
        find_checkpoint(str(saved), revision="main")


def test_hub_id_is_downloaded_and_its_commit_recorded(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = shutil.copytree(saved, tmp_path / COMMIT)
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(snapshot)

    fake_hub(monkeypatch, download)
    checkpoint = find_checkpoint("some-owner/some-model", revision="v1.0")
    assert checkpoint.name == "some-owner/some-model"
    assert checkpoint.revision == COMMIT
    assert checkpoint.directory == snapshot
    options = {"revision": "v1.0", "allow_patterns": list(HUB_PATTERNS)}
    assert asked == [("some-owner/some-model", options)]
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in HUB_PATTERNS)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("cannot find the files on disk\nmore"), "find the files on disk"),
        (ConnectionError(), "ConnectionError"),
        (httpx.ReadError("peer closed connection"), "ReadError: peer closed connection"),
    ],
)
def test_hub_that_gives_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    fake_hub(monkeypatch, download)
    text = error_of("some-owner/some-model", revision="v1.0")
    for part in ("'some-owner/some-model' at revision v1.0", reason, "name a local folder"):
        assert part in text
    assert "\n" not in text


def test_errors_of_the_hub_are_the_kind_that_is_caught() -> None:
    assert issubclass(RepositoryNotFoundError, OSError)
    assert issubclass(LocalEntryNotFoundError, OSError)


def test_neither_folder_nor_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise AssertionError("asked the hub")

    fake_hub(monkeypatch, download)
    assert "not a hub id" in error_of(tmp_path / "absent")


def test_config_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert error_of(folder).endswith("config.json is missing")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"model_type": "clip"', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"{}", "no 'model_type'"),
        (b'{"model_type": 7}', "no 'model_type'"),
    ],
)
def test_config_is_malformed(folder: Path, content: bytes, reason: str) -> None:
    (folder / "config.json").write_bytes(content)
    text = error_of(folder)
    assert reason in text
    assert str(folder / "config.json") in text


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    text = error_of(folder)
    for part in (
        "no model.safetensors",
        "pytorch_model.bin is a pickle",
        "convert it to safetensors",
    ):
        assert part in text


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    text = error_of(folder)
    assert "no model.safetensors" in text
    assert "pickle" not in text


def test_missing_shards_are_named(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    first.unlink()
    second.unlink()
    assert error_of(shards).endswith(f"missing weight files: {first.name}, {second.name}")


@pytest.mark.parametrize("content", ['{"metadata": {}}', '{"weight_map": [1]}', "{"])
def test_index_of_shards_is_malformed(shards: Path, content: str) -> None:
    (shards / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in error_of(shards)


def test_preprocessor_config_is_missing(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    checkpoint = find_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing"):
        _ = checkpoint.preprocessor_config


def test_preprocessor_config_in_a_processor_config(folder: Path) -> None:
    # As transformers 5 saves a CLIPProcessor; it prefers this file where both are there.
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(
        image_processor=CLIPImageProcessorPil(**sizes),
        tokenizer=AutoTokenizer.from_pretrained(str(folder)),
    ).save_pretrained(folder)
    before = find_checkpoint(str(folder))
    assert before.preprocessor_config["size"] == {"shortest_edge": 40}
    digest = before.digest
    nested = folder / "processor_config.json"
    nested.write_text(nested.read_text().replace("40", "41"))
    after = find_checkpoint(str(folder))
    assert after.preprocessor_config["size"] == {"shortest_edge": 41}
    assert after.digest != digest


def test_older_processor_config_says_nothing_of_images(folder: Path) -> None:
    before = find_checkpoint(str(folder))
    (folder / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    after = find_checkpoint(str(folder))
    assert after.preprocessor_config == before.preprocessor_config


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ],
)
def test_digest_changes_with_a_file(folder: Path, name: str) -> None:
    before = find_checkpoint(str(folder)).digest
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    if name.endswith("config.json"):  # must stay JSON
        content = bytearray(
            json.dumps({**json.loads((folder / name).read_bytes()), "x": 1}), "ascii"
        )
    (folder / name).write_bytes(content)
    assert find_checkpoint(str(folder)).digest != before


def test_digest_changes_with_any_shard(shards: Path) -> None:
    digests = {find_checkpoint(str(shards)).digest}
    paths = sorted(shards.glob("*.safetensors"))
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        digests.add(find_checkpoint(str(shards)).digest)
    assert len(digests) == 1 + len(paths)


@pytest.mark.parametrize("name", ["added_tokens.json", "sentencepiece.bpe.model"])
def test_digest_changes_with_a_file_that_is_added(folder: Path, name: str) -> None:
    before = find_checkpoint(str(folder)).digest
    (folder / name).write_text("{}")
    assert find_checkpoint(str(folder)).digest != before


def test_digest_does_not_depend_on_anything_else(folder: Path, saved: Path) -> None:
    before = find_checkpoint(str(saved)).digest
    assert len(bytes.fromhex(before)) == 32
    (folder / "README.md").write_text("# Another one")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    assert find_checkpoint(str(folder)).digest == before
