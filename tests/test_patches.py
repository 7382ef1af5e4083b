"""Patch embeddings as products against convolutions, on the GPU or in Triton's interpreter."""

import pytest
import torch
from torch import Tensor, nn

from engine.towers import Normalize
from tests.triton_device import DEVICE

from engine.backends.patches import NormalizedPatches, PatchProduct  # isort: skip

NORMALIZE = Normalize(mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), rescale_factor=1 / 255)
SHAPES = [
    pytest.param((2, 32, 48), 8, id="whole patches"),
    pytest.param((3, 31, 45), 14, id="pixels left over, width filled up"),
    pytest.param((1, 32, 32), 32, id="one patch"),
]


def random_pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_patches_are_those_of_normalized_pixels(
    shape: tuple[int, int, int], size: int, dtype: torch.dtype
) -> None:
    pixels, normalize = random_pixels(*shape), NORMALIZE.to(DEVICE)
    found = NormalizedPatches(normalize, patch_size=size, dtype=dtype)(pixels)
    num_images, height, width = shape
    rows, columns = height // size, width // size
    whole = normalize(pixels)[:, :, : rows * size, : columns * size].to(dtype)
    patches = whole.unfold(2, size, size).unfold(3, size, size)  # [N, 3, rows, columns, y, x]
    expected = patches.permute(0, 2, 3, 4, 5, 1).flatten(3)
    assert found.shape[:3] == (num_images, rows, columns)
    assert found.shape[3] % 8 == 0
    assert torch.equal(found[..., : expected.shape[3]], expected)
    assert not found[..., expected.shape[3] :].any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
@torch.inference_mode()
def test_products_are_those_of_the_convolution(
    shape: tuple[int, int, int], size: int, bias: bool
) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 24, kernel_size=size, stride=size, bias=bias).to(DEVICE).half()
    pixels, normalize = random_pixels(*shape), NORMALIZE.to(DEVICE)
    patches = NormalizedPatches(normalize, patch_size=size, dtype=torch.float16)(pixels)
    found = PatchProduct(convolution)(patches)
    expected = convolution.float()(normalize(pixels).half().float())
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    # Tokens lie one after the other: what makes them a sequence copies nothing.
    assert found.flatten(2).transpose(1, 2).is_contiguous()
