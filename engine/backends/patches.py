"""Patch embeddings as one matrix product: pixels as stored -> patches in 16 bit -> tokens.

Knows nothing of what becomes of the tokens.

A convolution whose stride is its kernel is a product of patches. cuDNN pads three channels to
eight and has no Hopper kernel for it: at 1,024 images of ViT-B/32 on an H200 that took 8 of 20 ms,
normalization and changes of layout included.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional

from engine.towers import Normalize

# cuBLAS reads rows in steps of 16 bytes.
_WIDTH_STEP = 8
_BLOCK_PATCHES, _BLOCK_WIDTH = 16, 256


@triton.jit(do_not_specialize=["num_patches"])
def _patches_kernel(
    pixels_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_patches: tl.tensor,
    height: tl.constexpr,
    width: tl.constexpr,
    size: tl.constexpr,
    out_width: tl.constexpr,
    block_patches: tl.constexpr,
    block_width: tl.constexpr,
) -> None:
    """Normalize patches of `size` x `size` pixels of RGB, each to a row that zeros fill up."""
    patches = tl.program_id(0) * block_patches + tl.arange(0, block_patches)
    values = tl.program_id(1) * block_width + tl.arange(0, block_width)
    columns: tl.constexpr = width // size
    per_image: tl.constexpr = height // size * columns
    image = (patches // per_image).to(tl.int64)
    top = patches % per_image // columns * size
    left = patches % columns * size
    # Bytes of the patches' corners, and from there to a value: rows, then columns, then channels.
    corners = ((image * height + top) * width + left) * 3
    inside = values // (3 * size) * (3 * width) + values % (3 * size)
    is_patch = (patches < num_patches)[:, None]
    is_value = (values < 3 * size * size)[None, :]
    x = tl.load(pixels_ptr + corners[:, None] + inside[None, :], mask=is_patch & is_value, other=0)
    scale = tl.load(scale_ptr + values % 3)
    shift = tl.load(shift_ptr + values % 3)
    y = x.to(tl.float32) * scale[None, :] + shift[None, :]
    y = tl.where(is_value, y, 0.0)
    offsets = patches.to(tl.int64)[:, None] * out_width + values[None, :]
    mask = is_patch & (values < out_width)[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


class NormalizedPatches(nn.Module):
    """In place of a `Normalize`: uint8 [N, H, W, 3] -> 16 bit [N, rows, columns, values]."""

    def __init__(self, normalize: Normalize, *, patch_size: int, dtype: torch.dtype) -> None:
        """Patches are squares of `patch_size` pixels; what is left at the edges is left out."""
        super().__init__()
        self._scale, self._shift = normalize.scale, normalize.shift
        self._size = patch_size
        self._dtype = dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """Cut and normalize; the same bits as `Normalize` and rounding."""
        num_images, height, width, _ = pixels.shape
        rows, columns = height // self._size, width // self._size
        out_width = _padded(3 * self._size**2)
        shape = (num_images, rows, columns, out_width)
        out = torch.empty(shape, dtype=self._dtype, device=pixels.device)
        num_patches = num_images * rows * columns
        grid = (triton.cdiv(num_patches, _BLOCK_PATCHES), triton.cdiv(out_width, _BLOCK_WIDTH))
        _patches_kernel[grid](
            pixels,
            self._scale,
            self._shift,
            out,
            num_patches,
            height=height,
            width=width,
            size=self._size,
            out_width=out_width,
            block_patches=_BLOCK_PATCHES,
            block_width=_BLOCK_WIDTH,
            enable_fp_fusion=False,  # a product and a sum, each rounded, as PyTorch has it
        )
        return out


class PatchProduct(nn.Module):
    """In place of a patch embedding, after `NormalizedPatches`."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        """Take over the weights of a convolution whose stride is its kernel."""
        super().__init__()
        weight = convolution.weight.detach().permute(0, 2, 3, 1).flatten(1)
        num_values = weight.shape[1]
        self._weight = functional.pad(weight, (0, _padded(num_values) - num_values))
        self._bias = None if convolution.bias is None else convolution.bias.detach()

    def forward(self, patches: Tensor) -> Tensor:
        """Map 16 bit [N, rows, columns, values] to [N, width, rows, columns], a view."""
        return functional.linear(patches, self._weight, self._bias).permute(0, 3, 1, 2)


def _padded(num_values: int) -> int:
    return -(-num_values // _WIDTH_STEP) * _WIDTH_STEP
