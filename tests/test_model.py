"""Checkpoints as towers: CLIP and dual encoders against transformers' models, and what is wrong."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.model import build_model, read_config
from tests.checkpoints import (
    EMBEDDING_DIM,
    IMAGE_SIZE,
    MAX_TOKENS,
    NUM_SPARE_IDS,
    save_clip,
    save_dinov2,
    save_dual_encoder,
    save_image_only,
    save_siglip,
)
from tests.references import (
    assert_tower,
    image_features,
    load,
    pixels_for,
    text_features,
    token_rows,
)

SAVED: dict[str, Callable[[Path], Path]] = {
    "clip": save_clip,
    "clip-legacy-eos": partial(save_clip, eos_token_id=2),
    "clip-gelu": partial(save_clip, act="gelu"),
    "clip-float16": partial(save_clip, dtype=torch.float16),
    "clip-shards": partial(save_clip, max_shard_size="40KB"),
    "dual": save_dual_encoder,
    "image-only": save_image_only,
}
WITH_TEXT = [name for name in SAVED if name != "image-only"]

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    made: dict[str, Path] = {}

    def directory_of(name: str) -> Path:
        if name not in made:
            made[name] = SAVED[name](tmp_path_factory.mktemp(name))
        return made[name]

    return directory_of


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    """A copy of a CLIP checkpoint to damage."""
    return shutil.copytree(saved("clip"), tmp_path / "copy")


def text_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["text_config"]


def rows_for(directory: Path, *, pad: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows that a checkpoint's text tower takes, and which ids are not padding."""
    config = text_config(directory)
    pad = config["pad_token_id"] if pad is None else pad
    if config["model_type"] == "bert":
        return token_rows(first=2, end=3, pad=pad, ids=range(5, config["vocab_size"]))
    first, end, ids = config["bos_token_id"], config["eos_token_id"], range(3, config["vocab_size"])
    if end == 2:
        # The largest id of the row ends the text, wherever it is.
        end, ids = ids.stop - 1, range(3, ids.stop - 1)
    return token_rows(first=first, end=end, pad=pad, ids=ids)


@pytest.mark.parametrize("name", list(SAVED))
@torch.inference_mode()
def test_image_tower_equals_transformers(saved: Saved, tmp_path: Path, name: str) -> None:
    model = load(saved(name))
    pixels = pixels_for(model)
    features = image_features(saved(name), pixels)
    assert features.shape[1] == EMBEDDING_DIM
    assert_tower(model.image_tower, pixels, features, folder=tmp_path)


@pytest.mark.parametrize("name", WITH_TEXT)
@torch.inference_mode()
def test_text_tower_equals_transformers(saved: Saved, tmp_path: Path, name: str) -> None:
    ids, is_text = rows_for(saved(name))
    features = text_features(saved(name), ids, attention_mask=is_text.long())
    assert features.shape[1] == EMBEDDING_DIM
    assert_tower(load(saved(name)).text_tower, ids, features, folder=tmp_path)


@pytest.mark.parametrize("name", WITH_TEXT)
@torch.inference_mode()
def test_padding_has_no_influence(saved: Saved, name: str) -> None:
    directory = saved(name)
    ids, is_text = rows_for(directory)
    tower = load(directory).text_tower
    assert tower is not None
    together = tower(ids)
    for row, length in enumerate(is_text.sum(dim=1)):
        alone = tower(ids[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-6)


@torch.inference_mode()
def test_any_padding_may_follow_the_end_of_a_clip_text(saved: Saved) -> None:
    tower = load(saved("clip")).text_tower
    assert tower is not None
    ids, _ = rows_for(saved("clip"))
    others, _ = rows_for(saved("clip"), pad=text_config(saved("clip"))["vocab_size"] - 1)
    assert not torch.equal(ids, others)
    torch.testing.assert_close(tower(ids), tower(others))


def test_end_of_text_is_not_the_largest_id(saved: Saved) -> None:
    # What the comparisons above need in order to tell the two ways of pooling apart.
    config = text_config(saved("clip"))
    ids, _ = rows_for(saved("clip"))
    assert config["eos_token_id"] == config["vocab_size"] - NUM_SPARE_IDS - 1
    assert (ids > config["eos_token_id"]).any()


def test_what_is_known_of_a_model(saved: Saved) -> None:
    model = load(saved("clip"))
    assert (model.embedding_dim, model.token_rules.max_tokens) == (EMBEDDING_DIM, MAX_TOKENS)
    assert (model.preprocessing.height, model.preprocessing.width) == (IMAGE_SIZE, IMAGE_SIZE)
    assert not model.image_tower.training


def test_image_only_checkpoint_has_no_text_tower(saved: Saved) -> None:
    model = load(saved("image-only"))
    assert model.text_tower is None
    assert model.token_rules is None


@torch.inference_mode()
def test_dual_encoder_as_older_transformers_saved_it(saved: Saved, tmp_path: Path) -> None:
    # Before version 5 the image half had a prefix of its own; transformers still reads it.
    directory = shutil.copytree(saved("dual"), tmp_path / "older")
    weights = load_file(directory / "model.safetensors")
    older = {
        name.replace("vision_model.", "vision_model.vision_model.", 1): tensor
        for name, tensor in weights.items()
    }
    save_file(older, directory / "model.safetensors", metadata={"format": "pt"})
    model = load(directory)
    pixels = pixels_for(model)
    assert_tower(model.image_tower, pixels, image_features(directory, pixels), folder=tmp_path)


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def change_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def error_of(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    return str(caught.value)


def test_missing_tensors_are_named(folder: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        del weights["visual_projection.weight"]
        del weights["vision_model.encoder.layers.1.mlp.fc1.bias"]

    change_weights(folder, change)
    text = error_of(folder)
    assert str(folder) in text
    assert "projection.weight is missing" in text
    assert "blocks.1.feed_forward.fc1.bias is missing" in text


def test_tensors_of_another_shape_are_named(folder: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["text_projection.weight"] = torch.zeros(7, 9)

    change_weights(folder, change)
    assert f"text_projection.weight is [7, 9], config says [{EMBEDDING_DIM}, 32]" in error_of(
        folder
    )


def test_a_long_list_of_faults_is_cut(folder: Path) -> None:
    change_config(folder, lambda config: config["vision_config"].update(num_hidden_layers=3))
    text = error_of(folder)
    assert text.count(" is missing") == 5
    assert text.endswith(" and 11 more")


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -10])
def test_weights_are_cut_short(folder: Path, num_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    text = error_of(folder)
    assert str(path) in text
    assert "not a whole safetensors file" in text
    assert "fetch it again" in text


@pytest.mark.parametrize("model_type", ["siglip2", "bert", "no-such-model"])
def test_unsupported_model_type(folder: Path, model_type: str) -> None:
    change_config(folder, lambda config: config.update(model_type=model_type))
    text = error_of(folder)
    assert f"models of type '{model_type}' are not supported" in text
    other = "siglip2-base-patch16-224" if model_type == "siglip2" else "vision-text-dual-encoder"
    assert other in text


@pytest.mark.parametrize(
    ("half", "model_type", "known"),
    [("vision_config", "resnet", "clip_vision_model"), ("text_config", "gpt2", "bert")],
)
def test_unsupported_half(
    saved: Saved, tmp_path: Path, half: str, model_type: str, known: str
) -> None:
    directory = shutil.copytree(saved("dual"), tmp_path / "copy")
    change_config(directory, lambda config: config[half].update(model_type=model_type))
    text = error_of(directory)
    assert f"a '{model_type}' half is not supported" in text
    assert known in text


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["vision_config"].update(hidden_size="wide"),
        lambda config: config["vision_config"].update(hidden_act="mish"),
        lambda config: config["text_config"].update(num_attention_heads=5),
    ],
    ids=["not-a-number", "activation", "heads"],
)
def test_settings_that_make_no_tower(folder: Path, change: Any) -> None:
    change_config(folder, change)
    assert str(folder) in error_of(folder)


def test_relative_positions_are_refused(saved: Saved, tmp_path: Path) -> None:
    directory = shutil.copytree(saved("dual"), tmp_path / "copy")
    change_config(
        directory,
        lambda config: config["text_config"].update(position_embedding_type="relative_key"),
    )
    assert "'relative_key' position embeddings is not supported" in error_of(directory)


def test_images_of_another_size_than_the_model_takes(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace(str(IMAGE_SIZE), "48"))
    text = error_of(folder)
    assert str(folder) in text
    assert "48x48" in text


def test_only_rgb_squares_are_supported(folder: Path) -> None:
    change_config(folder, lambda config: config["vision_config"].update(num_channels=1))
    assert "num_channels=1 of clip_vision_model: only RGB is supported" in error_of(folder)
    change_config(folder, lambda config: config["vision_config"].update(num_channels=3))
    change_config(folder, lambda config: config["vision_config"].update(image_size=[32, 40]))
    # transformers itself may refuse it first, under the same name.
    assert "image_size" in error_of(folder)


@pytest.mark.parametrize(
    "save", [save_clip, save_siglip, save_dinov2], ids=lambda save: save.__name__
)
@torch.inference_mode()
def test_settled_towers_can_be_filled_with_settled_tensors(tmp_path: Path, save: Any) -> None:
    source = load(save(tmp_path))
    model = build_model(read_config(tmp_path), preprocessing=source.preprocessing)
    model.settle()
    pixels = pixels_for(source)
    assert not torch.equal(model.image_tower(pixels), source.image_tower(pixels))
    model.image_tower.load_state_dict(source.image_tower.state_dict())
    torch.testing.assert_close(model.image_tower(pixels), source.image_tower(pixels))
