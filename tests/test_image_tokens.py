"""An image's tokens by one kernel against PyTorch's, on the GPU or in Triton's interpreter."""

import pytest
import torch

from engine.families.backbone import ImageTokens
from tests.rounded import assert_rounded, normalized, random, random_norm

from engine.backends.image_tokens import JoinedTokens  # isort: skip

DTYPES = [torch.float16, torch.bfloat16]
SIZES = [
    pytest.param(1, 1, 4, 48, id="a class token, one image"),
    pytest.param(3, 1, 49, 48, id="a class token"),
    pytest.param(2, 5, 7, 1280, id="registers, a large width"),
    pytest.param(2, 4, 9, 50, id="a width of which no token starts at 16 bytes"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_images", "num_special", "num_patches", "width"), SIZES)
@torch.inference_mode()
def test_tokens_are_pytorchs(
    num_images: int, num_special: int, num_patches: int, width: int, dtype: torch.dtype
) -> None:
    # Small, so that what a norm adds to the variance matters.
    patches = 0.03 * random(num_images, num_patches, width, dtype=dtype)
    special = 0.03 * random(num_special, width, dtype=dtype, seed=1)
    # As backbones have them: a slice of one table.
    positions = 0.03 * random(1 + num_patches, width, dtype=dtype, seed=2)[1:]
    norm = random_norm(dtype, width=width)
    expected = ImageTokens()(patches, special=special, positions=positions)
    found = JoinedTokens()(patches, special=special, positions=positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found = JoinedTokens()(patches, special=special, positions=positions, norm=norm)
    assert found.shape == expected.shape
    exact = normalized(expected.flatten(0, 1), norm)
    assert_rounded(found.flatten(0, 1), exact, scale=None, dtype=dtype)
