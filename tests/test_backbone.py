"""What families read from configs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError
from engine.families.backbone import (
    num_patches,
    patch_embedding,
    require,
    square_size,
    tokens,
)


def config(**changes: Any) -> Any:
    sizes = {"image_size": 224, "patch_size": 32, "num_channels": 3, "hidden_size": 8}
    return SimpleNamespace(model_type="clip_vision_model", **{**sizes, **changes})


@pytest.mark.parametrize("value", [14, [14, 14], (14, 14)], ids=str)
def test_a_square_is_one_number_or_two(value: object) -> None:
    assert square_size(config(patch_size=value), "patch_size") == 14


def test_an_oblong_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"image_size=\[224, 336\] of clip_vision_model"):
        square_size(config(image_size=[224, 336]), "image_size")


@pytest.mark.parametrize(("image_size", "number"), [(224, 49), (230, 49), (256, 64), (31, 0)])
def test_patches_are_whole(image_size: int, number: int) -> None:
    assert num_patches(config(image_size=image_size)) == number


@pytest.mark.parametrize("bias", [True, False])
def test_patch_embedding_makes_a_token_of_every_patch(bias: bool) -> None:
    layer = patch_embedding(config(), bias=bias)
    assert (layer.bias is not None) == bias
    found = tokens(layer(torch.zeros(2, 3, 64, 96)))
    assert found.shape == (2, 6, 8)


def test_tokens_go_by_row_and_then_by_column() -> None:
    patches = torch.arange(6).view(1, 1, 2, 3)
    assert tokens(patches).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_images_are_rgb() -> None:
    with pytest.raises(CheckpointError, match="num_channels=1 of clip_vision_model: only RGB"):
        patch_embedding(config(num_channels=1), bias=True)


def test_require_names_what_is_supported() -> None:
    require(config(), "num_channels", 3)
    with pytest.raises(CheckpointError, match=r"patch_size=32 of .* \(supported: 16\)"):
        require(config(), "patch_size", 16)
