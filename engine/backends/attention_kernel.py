"""Attention as one Triton kernel: from the joined projections to what the next product reads.

Knows nothing of towers or checkpoints: tensors in, tensors out.

It reads queries, keys and values where the product of all three wrote them, rounds them to FP8
where the engine says so, and writes FP8 where the next product reads it. PyTorch's own attention
would need a kernel before it and one after. Products are 16 bit (FP8 numbers are exact in it),
sums and softmax float32, as in `kernels`.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from engine.backends.kernels import inverse, product_input, store, to_fp8

_LOG2_E = tl.constexpr(math.log2(math.e))
# Positions in a tile. Tensor cores want at least 16; Hopper's want 64.
_MIN_TILE, _MAX_TILE = 16, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadFactors:
    """What queries, keys and values must be multiplied by on their way through attention.

    With `is_rounded`, the products see the FP8 numbers nearest to `query`, `key` and `value`
    times what was read; without, they see what was read, and those three are 1.
    """

    is_rounded: bool
    """Whether queries, keys and values are rounded to FP8."""
    query: float
    """Before rounding."""
    key: float
    """Before rounding."""
    value: float
    """Before rounding."""
    scores: float
    """Query times key, before the softmax."""
    mixed: float
    """Probabilities times value."""


@triton.jit
def _rounded(x: tl.tensor, factor: tl.tensor) -> tl.tensor:
    # FP8 numbers are exact in either 16-bit type, which the products take.
    return to_fp8(x.to(tl.float32) * factor).to(x.dtype)


@triton.jit(do_not_specialize=["length", "bias_row_stride", "bias_query_stride"])
def _attend_kernel(
    qkv_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    length: tl.tensor,
    bias_row_stride: tl.tensor,
    bias_query_stride: tl.tensor,
    query_factor: tl.tensor,
    key_factor: tl.tensor,
    value_factor: tl.tensor,
    score_factor: tl.tensor,
    out_factor: tl.tensor,
    is_rounded: tl.constexpr,
    num_heads: tl.constexpr,
    head_width: tl.constexpr,
    block_head: tl.constexpr,
    tile: tl.constexpr,
    num_tiles: tl.constexpr,
) -> None:
    """One tile of queries of one head against all keys (Dao et al. 2022, arXiv 2205.14135)."""
    head = tl.program_id(0) // num_tiles % num_heads
    row = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    queries = tl.program_id(0) % num_tiles * tile + tl.arange(0, tile)
    channels = tl.arange(0, block_head)
    is_channel = channels < head_width
    token_width: tl.constexpr = 3 * num_heads * head_width
    head_ptr = qkv_ptr + row * length * token_width + head * head_width

    query_mask = (queries < length)[:, None] & is_channel[None, :]
    query_offsets = queries[:, None] * token_width + channels[None, :]
    query = tl.load(head_ptr + query_offsets, mask=query_mask, other=0.0)
    if is_rounded:
        query = _rounded(query, query_factor)
    largest = tl.full([tile], float("-inf"), tl.float32)
    total = tl.zeros([tile], tl.float32)
    mixed = tl.zeros([tile, block_head], tl.float32)
    for key_tile in range(num_tiles):
        keys = key_tile * tile + tl.arange(0, tile)
        is_key = keys < length
        key_mask = is_key[:, None] & is_channel[None, :]
        key_offsets = keys[:, None] * token_width + channels[None, :]
        key_ptr = head_ptr + num_heads * head_width
        key = tl.load(key_ptr + key_offsets, mask=key_mask, other=0.0)
        value = tl.load(key_ptr + num_heads * head_width + key_offsets, mask=key_mask, other=0.0)
        if is_rounded:
            key = _rounded(key, key_factor)
            value = _rounded(value, value_factor)
        scores = tl.dot(query, tl.trans(key)) * (score_factor * _LOG2_E)
        if bias_ptr is not None:
            bias_offsets = queries[:, None] * bias_query_stride + keys[None, :]
            bias_mask = (queries < length)[:, None] & is_key[None, :]
            bias = tl.load(bias_ptr + row * bias_row_stride + bias_offsets, mask=bias_mask, other=0)
            scores += bias.to(tl.float32) * _LOG2_E
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        exponentials = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(exponentials, axis=1)
        mixed = mixed * shrink[:, None] + tl.dot(exponentials.to(value.dtype), value)
        largest = new_largest
    out_offsets = queries[:, None] * (num_heads * head_width) + channels[None, :]
    out_ptr += row * length * (num_heads * head_width) + head * head_width
    store(out_ptr + out_offsets, mixed / total[:, None] * out_factor, query_mask)


def attend(
    qkv: Tensor,
    *,
    num_rows: int,
    num_heads: int,
    factors: HeadFactors,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Multi-head self-attention, for the next product.

    Args:
        qkv: 16 bit [num_rows * T, 3 * width]: queries, keys and values side by side.
        num_rows: Of the batch.
        num_heads: Divides the width.
        factors: That the products before left to be done.
        bias: Added to the scores; 16 bit, broadcast to [num_rows, 1, T, T].
        scale: Of the product's FP8 input; None for 16 bit.

    Returns:
        [num_rows * T, width].
    """
    length, width = qkv.shape[0] // num_rows, qkv.shape[1] // 3
    row_stride = query_stride = 0
    if bias is not None:
        bias = bias.contiguous().broadcast_to(num_rows, 1, bias.shape[-2], length)
        row_stride = bias.stride(0)
        query_stride = bias.stride(2) if bias.shape[2] == length else 0
    head_width = width // num_heads
    tile = min(_MAX_TILE, max(_MIN_TILE, triton.next_power_of_2(length)))
    out = product_input(qkv[:, :width], scale)
    num_tiles = triton.cdiv(length, tile)
    _attend_kernel[(num_rows * num_heads * num_tiles,)](
        qkv,
        bias,
        out,
        length,
        row_stride,
        query_stride,
        factors.query,
        factors.key,
        factors.value,
        factors.scores,
        factors.mixed * inverse(scale),
        is_rounded=factors.is_rounded,
        num_heads=num_heads,
        head_width=head_width,
        block_head=max(_MIN_TILE, triton.next_power_of_2(head_width)),
        tile=tile,
        num_tiles=num_tiles,
        num_warps=4 if tile == _MAX_TILE else 2,
        # A third stage of wide heads would exceed the shared memory of cards other than sm_90.
        num_stages=2,
    )
    return out
