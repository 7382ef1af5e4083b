"""A plain ViT against transformers' `ViTModel`."""

from functools import partial
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError
from engine.families.vit import ImageBackbone
from tests.checkpoints import save_dual_encoder, save_vit, vit_config
from tests.references import (
    assert_points_lie_in_blocks,
    assert_tower,
    image_features,
    load,
    pixels_for,
)

SAVED = {
    "alone": save_vit,
    "other-pooler": partial(save_vit, pooler_output_size=20, pooler_act="gelu"),
    "other-patches": partial(save_vit, patch_size=[16, 16], image_size=[32, 32]),
    "half-of-a-dual-encoder": partial(save_dual_encoder, image=vit_config()),
}


@pytest.mark.parametrize("name", list(SAVED))
@torch.inference_mode()
def test_image_tower_equals_transformers(tmp_path: Path, name: str) -> None:
    directory = SAVED[name](tmp_path)
    model = load(directory)
    pixels = pixels_for(model)
    features = image_features(directory, pixels)
    assert model.embedding_dim == features.shape[1]
    assert_tower(model.image_tower, pixels, features, folder=tmp_path)
    assert_points_lie_in_blocks(model.image_tower)


def test_query_without_bias_is_refused() -> None:
    with pytest.raises(CheckpointError, match="qkv_bias=False of vit is not supported"):
        ImageBackbone(vit_config(qkv_bias=False))
