"""DINOv2 against transformers' `Dinov2Model` and `Dinov2WithRegistersModel`."""

from functools import partial
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError
from engine.families.dinov2 import ImageBackbone, ScaledBlock
from engine.towers import BlockShape, PreNormBlock
from tests.checkpoints import WIDTH, dinov2_config, save_dinov2, save_dual_encoder
from tests.references import (
    assert_points_lie_in_blocks,
    assert_tower,
    image_features,
    load,
    pixels_for,
)

SAVED = {
    "as-trained": save_dinov2,
    "smaller-images": partial(save_dinov2, image_size=72),
    "larger-images": partial(save_dinov2, image_size=24),
    "oblong-images": partial(save_dinov2, height=24, width=32),
    "between-patches": partial(save_dinov2, height=30, width=27),
    "giant": partial(save_dinov2, use_swiglu_ffn=True),
    "registers": partial(save_dinov2, num_registers=4),
    "registers-smaller-images": partial(save_dinov2, num_registers=3, image_size=72),
    "registers-giant": partial(save_dinov2, num_registers=4, use_swiglu_ffn=True),
    "half-of-a-dual-encoder": partial(save_dual_encoder, image=dinov2_config(image_size=72)),
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


def test_what_is_known_of_a_model(tmp_path: Path) -> None:
    model = load(save_dinov2(tmp_path))
    assert model.embedding_dim == WIDTH
    assert model.text_tower is None
    # Nothing of LayerScale is left to be executed.
    assert {type(block) for block in model.image_tower.backbone.blocks} == {PreNormBlock}


@pytest.mark.parametrize("act", ["gelu", "swiglu"])
@torch.inference_mode()
def test_folding_scales_changes_nothing(act: str) -> None:
    generator = torch.Generator().manual_seed(0)
    block = ScaledBlock(
        BlockShape(width=WIDTH, hidden_width=40, num_heads=4, act=act, norm_eps=1e-6)
    )
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 5, WIDTH, generator=generator)
    expected = block(x)
    folded = block.folded()
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-4)
    assert not any(parameter.is_meta for parameter in folded.parameters())


def test_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(CheckpointError, match="images of 7x32 pixels are smaller than one patch"):
        ImageBackbone(dinov2_config()).settle(height=7, width=32)
