"""The towers of every family and variant against transformers' own models."""

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
from torch.nn import functional
from transformers import CLIPModel, CLIPVisionModelWithProjection, VisionTextDualEncoderModel

from engine.checkpoint import find_checkpoint
from engine.errors import CheckpointError
from engine.model import Model, load_model
from tests.checkpoints import (
    EMBEDDING_DIM,
    IMAGE_SIZE,
    MAX_TOKENS,
    NUM_SPARE_IDS,
    save_clip,
    save_dual_encoder,
    save_image_only,
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
CLASSES: dict[str, Any] = {
    "clip": CLIPModel,
    "vision-text-dual-encoder": VisionTextDualEncoderModel,
    "clip_vision_model": CLIPVisionModelWithProjection,
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


def load(directory: Path) -> Model:
    return load_model(find_checkpoint(str(directory)))


def reference(directory: Path) -> Any:
    config = json.loads((directory / "config.json").read_text())
    return CLASSES[config["model_type"]].from_pretrained(directory, dtype=torch.float32).eval()


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(
        0, 256, (4, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator
    )


def normalized(pixels: Tensor, directory: Path) -> Tensor:
    config = json.loads((directory / "preprocessor_config.json").read_text())
    mean, std = torch.tensor(config["image_mean"]), torch.tensor(config["image_std"])
    return ((pixels.float() * config["rescale_factor"] - mean) / std).permute(0, 3, 1, 2)


def text_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["text_config"]


def token_rows(directory: Path, *, pad_token_id: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids int32 [5, 16], padded, and which of them are not padding."""
    config = text_config(directory)
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([16, 2, 9, 5, 12])
    if config["model_type"] == "bert":
        first, end, low, high = 2, 3, 5, config["vocab_size"]
    else:
        # Some ids are larger than that of the end-of-text token.
        low, high = 3, config["vocab_size"]
        first, end = config["bos_token_id"], config["eos_token_id"]
        if end == 2:
            # The largest id of the row ends the text, wherever it is.
            end, high = config["vocab_size"] - 1, config["vocab_size"] - 1
    drawn = torch.randint(low, high, (len(lengths), MAX_TOKENS), generator=generator)
    ids = drawn.masked_fill(drawn == end, low)
    ids[:, 0] = first
    ids[torch.arange(len(lengths)), lengths - 1] = end
    is_text = torch.arange(MAX_TOKENS) < lengths[:, None]
    pad = config["pad_token_id"] if pad_token_id is None else pad_token_id
    return ids.masked_fill(~is_text, pad).int(), is_text


def assert_same_embeddings(ours: Tensor, features: Tensor) -> None:
    theirs = functional.normalize(features)
    assert ours.dtype == torch.float32
    assert ours.shape == (len(features), EMBEDDING_DIM)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # Rows apart by far more than the tolerance, or equality would say little.
    assert torch.pdist(theirs).min() > 0.01


@pytest.mark.parametrize("name", list(SAVED))
@torch.inference_mode()
def test_image_tower_equals_transformers(saved: Saved, name: str) -> None:
    directory = saved(name)
    model, values = reference(directory), normalized(pixels(), directory)
    features = (
        model(pixel_values=values).image_embeds
        if name == "image-only"
        else model.get_image_features(pixel_values=values).pooler_output
    )
    assert_same_embeddings(load(directory).image_tower(pixels()), features)


@pytest.mark.parametrize("name", WITH_TEXT)
@torch.inference_mode()
def test_text_tower_equals_transformers(saved: Saved, name: str) -> None:
    directory = saved(name)
    ids, is_text = token_rows(directory)
    features = reference(directory).get_text_features(
        input_ids=ids.long(), attention_mask=is_text.long()
    )
    tower = load(directory).text_tower
    assert tower is not None
    assert_same_embeddings(tower(ids), features.pooler_output)


@pytest.mark.parametrize("name", WITH_TEXT)
@torch.inference_mode()
def test_padding_has_no_influence(saved: Saved, name: str) -> None:
    directory = saved(name)
    ids, is_text = token_rows(directory)
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
    ids, _ = token_rows(saved("clip"))
    others, _ = token_rows(saved("clip"), pad_token_id=text_config(saved("clip"))["vocab_size"] - 1)
    assert not torch.equal(ids, others)
    torch.testing.assert_close(tower(ids), tower(others))


def test_end_of_text_is_not_the_largest_id(saved: Saved) -> None:
    # What the comparisons above need in order to tell the two ways of pooling apart.
    config = text_config(saved("clip"))
    ids, _ = token_rows(saved("clip"))
    assert config["eos_token_id"] == config["vocab_size"] - NUM_SPARE_IDS - 1
    assert (ids > config["eos_token_id"]).any()


def test_what_is_known_of_a_model(saved: Saved) -> None:
    model = load(saved("clip"))
    assert (model.embedding_dim, model.max_tokens) == (EMBEDDING_DIM, MAX_TOKENS)
    assert (model.preprocessing.height, model.preprocessing.width) == (IMAGE_SIZE, IMAGE_SIZE)
    assert not model.image_tower.training


def test_image_only_checkpoint_has_no_text_tower(saved: Saved) -> None:
    model = load(saved("image-only"))
    assert model.text_tower is None
    assert model.max_tokens is None


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
    features = reference(directory).get_image_features(pixel_values=normalized(pixels(), directory))
    assert_same_embeddings(load(directory).image_tower(pixels()), features.pooler_output)


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


@pytest.mark.parametrize("model_type", ["siglip", "bert", "no-such-model"])
def test_unsupported_model_type(folder: Path, model_type: str) -> None:
    change_config(folder, lambda config: config.update(model_type=model_type))
    text = error_of(folder)
    assert f"models of type '{model_type}' are not supported" in text
    assert "vision-text-dual-encoder" in text


@pytest.mark.parametrize(
    ("half", "model_type", "known"),
    [("vision_config", "vit", "clip_vision_model"), ("text_config", "gpt2", "bert")],
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
    with pytest.raises(CheckpointError):
        load(folder)


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
