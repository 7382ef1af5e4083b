"""SigLIP's towers against transformers' `SiglipModel`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig

from engine.errors import CheckpointError
from engine.families.siglip import ImageBackbone
from tests.checkpoints import (
    EMBEDDING_DIM,
    MAX_TOKENS,
    WIDTH,
    gemma_tokenizer,
    save_dual_encoder,
    save_siglip,
    save_siglip_image_only,
)
from tests.references import (
    assert_points_lie_in_blocks,
    assert_tower,
    image_features,
    load,
    pixels_for,
    text_features,
    token_rows,
)

SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 5,
    "image_size": 32,
    "patch_size": 16,
}
SAVED: dict[str, Callable[[Path], Path]] = {
    "siglip": save_siglip,
    "image-only": save_siglip_image_only,
    "half-of-a-dual-encoder": partial(save_dual_encoder, image=SiglipVisionConfig(**SIZES)),
}


@pytest.mark.parametrize("name", list(SAVED))
@torch.inference_mode()
def test_image_tower_equals_transformers(tmp_path: Path, name: str) -> None:
    directory = SAVED[name](tmp_path)
    model = load(directory)
    pixels = pixels_for(model)
    features = image_features(directory, pixels)
    assert_tower(model.image_tower, pixels, features, folder=tmp_path)
    assert_points_lie_in_blocks(model.image_tower)


@pytest.mark.parametrize("tokenizer", [None, gemma_tokenizer()], ids=["siglip", "siglip2"])
@torch.inference_mode()
def test_text_tower_equals_transformers(tmp_path: Path, tokenizer: Any) -> None:
    directory = save_siglip(tmp_path, tokenizer=tokenizer)
    tower = load(directory).text_tower
    ids, _ = token_rows(first=None, end=1, pad=0, ids=range(5, 140))
    assert_tower(tower, ids, text_features(directory, ids), folder=tmp_path)
    assert_points_lie_in_blocks(tower)


@torch.inference_mode()
def test_padding_counts(tmp_path: Path) -> None:
    tower = load(save_siglip(tmp_path)).text_tower
    ids, _ = token_rows(first=None, end=1, pad=0, ids=range(5, 140))
    others, _ = token_rows(first=None, end=1, pad=3, ids=range(5, 140))
    torch.testing.assert_close(tower(ids)[0], tower(others)[0])
    assert (tower(ids)[1:] - tower(others)[1:]).norm(dim=1).min() > 0.01


def test_what_is_known_of_a_model(tmp_path: Path) -> None:
    model = load(save_siglip(tmp_path))
    assert model.embedding_dim == WIDTH
    assert model.token_rules.pads_to_max
    assert model.token_rules.max_tokens == MAX_TOKENS
    assert model.token_rules.vocab_size == 144
    assert model.token_rules.special_token_ids == {}


def test_embeddings_of_two_lengths_are_refused(tmp_path: Path) -> None:
    directory = save_siglip(tmp_path, projection_size=EMBEDDING_DIM)
    message = "image embeddings have 32 dimensions, text embeddings 24"
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_without_pooling_there_is_no_embedding() -> None:
    config = SiglipVisionConfig(**SIZES, vision_use_head=False)
    with pytest.raises(CheckpointError, match="vision_use_head=False of siglip_vision_model"):
        ImageBackbone(config)


def test_pooling_that_a_config_does_not_speak_of() -> None:
    """That of transformers 5.17 does not."""
    settings = {**vars(SiglipVisionConfig(**SIZES)), "model_type": "siglip_vision_model"}
    settings.pop("vision_use_head", None)
    assert ImageBackbone(SimpleNamespace(**settings)).pooler.width == SIZES["hidden_size"]


def test_parts_of_one_tensor_are_checked_like_any_other(tmp_path: Path) -> None:
    directory = save_siglip(tmp_path)
    path, name = directory / "model.safetensors", "vision_model.head.attention.in_proj_weight"
    weights = load_file(path)
    save_file({**weights, name: weights[name][:60]}, path)
    with pytest.raises(CheckpointError, match=rf"{name} is \[20, 32\], config says \[32, 32\]"):
        load(directory)
    save_file({**weights, name: weights[name][:2]}, path)
    with pytest.raises(CheckpointError, match=r"pooler.value.weight is missing"):
        load(directory)
