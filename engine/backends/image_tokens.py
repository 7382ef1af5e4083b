"""An image's tokens by one Triton kernel: special tokens, patches, positions and their norm.

Knows nothing of where patches come from or which tokens are special.

PyTorch takes a kernel each for the sum, the concatenation and the norm, and each reads and writes
nearly all tokens.
"""

import triton
import triton.language as tl
from torch import Tensor, nn

from engine.backends.kernels import VALUES_PER_PROGRAM, normalized
from engine.families.backbone import ImageTokens


@triton.jit(do_not_specialize=["num_tokens", "length", "num_special"])
def _tokens_kernel(
    patches_ptr: tl.tensor,
    special_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    length: tl.tensor,
    num_special: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    block_width: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    """`length` tokens of each image, one image after the other; pointers to a norm may be None."""
    tokens = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    channels = tl.arange(0, block_width)
    mask = (tokens < num_tokens)[:, None] & (channels < width)[None, :]
    image = (tokens // length).to(tl.int64)
    token = tokens % length
    patch = token - num_special
    is_patch = (patch >= 0)[:, None] & mask
    is_special = (patch < 0)[:, None] & mask
    patch_offsets = (image * (length - num_special) + patch)[:, None] * width + channels[None, :]
    position_offsets = patch[:, None] * width + channels[None, :]
    special_offsets = token[:, None] * width + channels[None, :]
    x = tl.load(patches_ptr + patch_offsets, mask=is_patch, other=0.0).to(tl.float32)
    x += tl.load(positions_ptr + position_offsets, mask=is_patch, other=0.0).to(tl.float32)
    x += tl.load(special_ptr + special_offsets, mask=is_special, other=0.0).to(tl.float32)
    x = x.to(out_ptr.dtype.element_ty)
    if weight_ptr is not None:
        y = normalized(x.to(tl.float32), weight_ptr, bias_ptr, eps, channels, width)
        x = y.to(out_ptr.dtype.element_ty)
    offsets = tokens.to(tl.int64)[:, None] * width + channels[None, :]
    tl.store(out_ptr + offsets, x, mask=mask)


class JoinedTokens(ImageTokens):
    """In place of `ImageTokens`."""

    def forward(
        self,
        patches: Tensor,
        *,
        special: Tensor,
        positions: Tensor,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """Join them as `ImageTokens` does, rounded where it rounds; all contiguous."""
        num_images, num_patches, width = patches.shape
        length = len(special) + num_patches
        num_tokens = num_images * length
        out = patches.new_empty((num_images, length, width))
        block_width = triton.next_power_of_2(width)
        block_tokens = max(1, VALUES_PER_PROGRAM // block_width)
        _tokens_kernel[(triton.cdiv(num_tokens, block_tokens),)](
            patches,
            special,
            positions,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            out,
            num_tokens,
            length,
            len(special),
            0.0 if norm is None else norm.eps,
            width=width,
            block_width=block_width,
            block_tokens=block_tokens,
            num_warps=8,
        )
        return out
