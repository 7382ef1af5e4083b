"""Attention by one Triton kernel: from the joined projections to what the next product reads.

Knows nothing of towers or checkpoints: tensors in, tensors out.

It reads queries, keys and values where the product of all three wrote them, in FP8 or 16 bit, and
writes FP8 where the next product reads it. PyTorch's own attention would need a kernel before it
and one after. Queries times keys is a product of what was read, probabilities times values one of
16 bit; sums and softmax are float32, as in `kernels`.

`attention_tiling` chooses between two kernels. A program of the general one has a tile of queries
and meets the keys tile by tile, or all at once where they are one tile. A program of the resident
one has all queries of a head, and keeps its keys and values, read once, in shared memory.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.backends.attention_tiling import MAX_TILE, MIN_TILE, tiling
from engine.backends.kernels import inverse, product_input, program_from_end, store
from engine.quantization.fp8 import FP8

_LOG2_E = tl.constexpr(math.log2(math.e))
# Channels in a tile. FP8 products want at least 32.
_MIN_BLOCK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadFactors:
    """What products in attention must be multiplied by, for what was left out before them."""

    scores: float
    """Query times key, before the softmax; above 0."""
    mixed: float
    """Probabilities times value."""


@triton.jit
def _read(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """What lies there, and zeros where a mask says so."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _read_values(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Values in 16 bit; those of FP8 are exact in float16, and probabilities best."""
    x = _read(pointers, mask)
    return x.to(tl.float16) if x.dtype == tl.float8e4nv else x


@triton.jit
def _mix(
    scores: tl.tensor,
    factor: tl.tensor,
    value: tl.tensor,
    running: tl.tuple,
    key_axis: tl.constexpr,
) -> tl.tuple:
    """A tile of keys' step of an online softmax (Dao et al. 2022, arXiv 2205.14135).

    `running` is None before the first step, then what each query has by now: the largest
    `scores * factor`, the sum of exponentials, and values weighted by them.
    """
    largest = tl.max(scores, axis=key_axis) * factor
    if running is not None:
        largest = tl.maximum(largest, running[0])
    weights = tl.exp2(scores * factor - tl.expand_dims(largest, key_axis))
    total = tl.sum(weights, axis=key_axis)
    mixed = None
    if running is not None:
        shrink = tl.exp2(running[0] - largest)
        total += running[1] * shrink
        mixed = running[2] * tl.expand_dims(shrink, key_axis)
    if key_axis == 1:
        mixed = tl.dot(weights.to(value.dtype), value, mixed)
    else:
        mixed = tl.dot(tl.trans(value), weights.to(value.dtype), mixed)
    return largest, total, mixed


@triton.jit(do_not_specialize=["length", "bias_row_stride", "bias_query_stride"])
def _general_kernel(
    qkv_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    length: tl.tensor,
    bias_row_stride: tl.tensor,
    bias_query_stride: tl.tensor,
    score_factor: tl.tensor,
    out_factor: tl.tensor,
    num_heads: tl.constexpr,
    head_width: tl.constexpr,
    block_head: tl.constexpr,
    tile: tl.constexpr,
    num_tiles: tl.constexpr,
    num_query_tiles: tl.constexpr,
    is_full: tl.constexpr,
) -> None:
    """One tile of queries of one head against all keys; `is_full` if they leave no room."""
    program = program_from_end()
    head = program // num_query_tiles % num_heads
    row = (program // num_query_tiles // num_heads).to(tl.int64)
    queries = program % num_query_tiles * tile + tl.arange(0, tile)
    channels = tl.arange(0, block_head)
    is_channel = channels < head_width
    width: tl.constexpr = num_heads * head_width
    query_ptr = qkv_ptr + row * length * (3 * width) + head * head_width
    key_ptr = query_ptr + width
    value_ptr = key_ptr + width
    score_factor *= _LOG2_E

    query_mask = None if is_full else (queries < length)[:, None] & is_channel[None, :]
    query_offsets = queries[:, None] * (3 * width) + channels[None, :]
    query = _read(query_ptr + query_offsets, query_mask)
    largest = tl.full([tile], float("-inf"), tl.float32)
    total = tl.zeros([tile], tl.float32)
    mixed = tl.zeros([tile, block_head], tl.float32)
    for key_tile in range(num_tiles):
        keys = key_tile * tile + tl.arange(0, tile)
        is_key = keys < length
        key_mask = None if is_full else is_key[:, None] & is_channel[None, :]
        key_offsets = keys[:, None] * (3 * width) + channels[None, :]
        key = _read(key_ptr + key_offsets, key_mask)
        value = _read_values(value_ptr + key_offsets, key_mask)
        scores = tl.dot(query, tl.trans(key))
        if not is_full:
            scores = tl.where(is_key[None, :], scores, float("-inf"))
        if bias_ptr is not None:
            bias_offsets = queries[:, None] * bias_query_stride + keys[None, :]
            bias_mask = None if is_full else (queries < length)[:, None] & is_key[None, :]
            bias = _read(bias_ptr + row * bias_row_stride + bias_offsets, bias_mask)
            scores = scores * score_factor + bias.to(tl.float32) * _LOG2_E
        largest, total, mixed = _mix(
            scores,
            score_factor if bias_ptr is None else 1.0,
            value,
            None if num_tiles == 1 else (largest, total, mixed),
            key_axis=1,
        )
    out_offsets = queries[:, None] * width + channels[None, :]
    out_ptr += row * length * width + head * head_width
    store(out_ptr + out_offsets, mixed * (out_factor / total)[:, None], query_mask)


@triton.jit
def _attended(
    query: tl.tensor,
    keys: tl.tuple,
    values: tl.tuple,
    is_tail_key: tl.tensor,
    score_factor: tl.tensor,
    out_factor: tl.tensor,
    key_axis: tl.constexpr,
) -> tl.tensor:
    """A tile of queries against all keys, of which the first tile is the tail where there is one.

    The result is transposed where keys are the scores' axis 0.
    """
    running: tl.tuple = None
    for i in tl.static_range(len(keys)):
        if key_axis == 1:
            scores = tl.dot(query, tl.trans(keys[i]))
        else:
            scores = tl.dot(keys[i], tl.trans(query))
        if i == 0 and is_tail_key is not None:
            mask = tl.expand_dims(is_tail_key, 1 - key_axis)
            scores = tl.where(mask, scores, float("-inf"))
        running = _mix(scores, score_factor, values[i], running, key_axis)
    return running[2] * tl.expand_dims(out_factor / running[1], key_axis)


@triton.jit(do_not_specialize=["length"])
def _resident_kernel(
    qkv_ptr: tl.tensor,
    out_ptr: tl.tensor,
    length: tl.tensor,
    score_factor: tl.tensor,
    out_factor: tl.tensor,
    num_heads: tl.constexpr,
    head_width: tl.constexpr,
    tile: tl.constexpr,
    num_tiles: tl.constexpr,
    num_query_tiles: tl.constexpr,
    tail: tl.constexpr,
    tail_terms: tl.constexpr,
) -> None:
    """Tiles of queries of one head, with all of them also those of the tail, against all keys."""
    program = program_from_end()
    head = program % num_heads
    row = (program // num_heads).to(tl.int64)
    width: tl.constexpr = num_heads * head_width
    query_ptr = qkv_ptr + row * length * (3 * width) + head * head_width
    key_ptr = query_ptr + width
    value_ptr = key_ptr + width
    out_ptr += row * length * width + head * head_width
    score_factor *= _LOG2_E
    channels = tl.arange(0, head_width)

    # Four tiles and a tail compile to 155 registers for sm_90 (Triton 3.6), so that three programs
    # run at a time; other orders and other forms of the offsets, to up to 255.
    keys: tl.tuple = ()
    values: tl.tuple = ()
    is_tail_key: tl.tensor = None
    if tail > 0:
        tail_keys = num_tiles * tile + tl.arange(0, tail_terms)
        is_tail_key = tail_keys < length
        tail_mask = is_tail_key[:, None]
        tail_offsets = tail_keys[:, None] * (3 * width) + channels[None, :]
        keys += (_read(key_ptr + tail_offsets, tail_mask),)
        values += (_read_values(value_ptr + tail_offsets, tail_mask),)
    for i in tl.static_range(num_tiles):
        tokens = i * tile + tl.arange(0, tile)
        tile_offsets = tokens[:, None] * (3 * width) + channels[None, :]
        keys += (_read(key_ptr + tile_offsets, None),)
        values += (_read_values(value_ptr + tile_offsets, None),)

    if tail > 0 and num_query_tiles == num_tiles:
        # Keys are the rows, since Hopper's tensor cores want 64; columns may be as few as 8.
        tail_queries = num_tiles * tile + tl.arange(0, tail)
        is_tail_query = tail_queries < length
        tail_query_offsets = tail_queries[:, None] * (3 * width) + channels[None, :]
        tail_query = _read(query_ptr + tail_query_offsets, is_tail_query[:, None])
        tail_mixed = _attended(
            tail_query, keys, values, is_tail_key, score_factor, out_factor, key_axis=0
        )
        tail_out_offsets = tail_queries[None, :] * width + channels[:, None]
        store(out_ptr + tail_out_offsets, tail_mixed, is_tail_query[None, :])
    query_offsets = tl.arange(0, tile)[:, None] * (3 * width) + channels[None, :]
    query = _read(query_ptr + query_offsets, None)
    for i in tl.range(num_query_tiles):
        queries = i * tile + tl.arange(0, tile)
        # A tile ahead, and the last one again: three programs do not hide the load. (Without it,
        # instructions were issued in 34 % of the cycles: Nsight Compute.)
        next_start = tl.minimum(i + 1, num_query_tiles - 1) * tile
        next_query = _read(query_ptr + next_start * (3 * width) + query_offsets, None)
        mixed = _attended(query, keys, values, is_tail_key, score_factor, out_factor, key_axis=1)
        store(out_ptr + queries[:, None] * width + channels[None, :], mixed, None)
        query = next_query


def attend(
    qkv: Tensor,
    *,
    num_rows: int,
    num_heads: int,
    factors: HeadFactors,
    bias: Tensor | None,
    scale: float | None,
    dtype: torch.dtype,
    num_queries: int | None = None,
) -> Tensor:
    """Multi-head self-attention, for the next product.

    Args:
        qkv: FP8 or 16 bit [num_rows * T, 3 * width]: queries, keys and values side by side.
        num_rows: Of the batch.
        num_heads: Divides the width.
        factors: That the products before left to be done.
        bias: Added to the scores; 16 bit, broadcast to [num_rows, 1, T, T].
        scale: Of the product's FP8 input; None for 16 bit.
        dtype: Of the result where `scale` is None: 16 bit, which FP8 `qkv` does not tell.
        num_queries: How many of each row are wanted, from its first token on; None: all.

    Returns:
        [num_rows * T, width]; undefined for tokens that are not wanted.
    """
    length, width = qkv.shape[0] // num_rows, qkv.shape[1] // 3
    head_width = width // num_heads
    # Triton's interpreter, which the CPU means, runs what Hopper does.
    is_interpreted = qkv.device.type == "cpu"
    is_fp8 = qkv.dtype == FP8
    tiles = tiling(
        length,
        head_width=head_width,
        has_bias=bias is not None,
        is_fp8=is_fp8,
        is_hopper=is_interpreted or torch.cuda.get_device_capability(qkv.device)[0] == 9,
    )
    num_query_tiles = min(-(-(num_queries or length) // tiles.tile), tiles.num_tiles)
    out = product_input(qkv[:, :width], scale, dtype=dtype)
    out_factor = factors.mixed * inverse(scale)
    # Triton loads no FP8 ahead, as its values pass through registers. A third stage of wide heads
    # would exceed the shared memory of cards other than sm_90.
    num_stages = 1 if is_fp8 else 2
    if tiles.is_resident:
        _resident_kernel[(num_rows * num_heads,)](
            qkv,
            out,
            length,
            factors.scores,
            out_factor,
            num_heads=num_heads,
            head_width=head_width,
            tile=tiles.tile,
            num_tiles=tiles.num_tiles,
            num_query_tiles=num_query_tiles,
            tail=tiles.tail,
            tail_terms=MIN_TILE,  # what tensor cores want, masked beyond the tail
            num_warps=4,
            num_stages=num_stages,
        )
        return out
    row_stride = query_stride = 0
    if bias is not None:
        bias = bias.contiguous().broadcast_to(num_rows, 1, bias.shape[-2], length)
        row_stride = bias.stride(0)
        query_stride = bias.stride(2) if bias.shape[2] == length else 0
    block_head = max(_MIN_BLOCK, triton.next_power_of_2(head_width))
    _general_kernel[(num_rows * num_heads * num_query_tiles,)](
        qkv,
        bias,
        out,
        length,
        row_stride,
        query_stride,
        factors.scores,
        out_factor,
        num_heads=num_heads,
        head_width=head_width,
        block_head=block_head,
        tile=tiles.tile,
        num_tiles=tiles.num_tiles,
        num_query_tiles=num_query_tiles,
        is_full=length % tiles.tile == 0 and head_width == block_head,
        num_warps=4 if tiles.tile == MAX_TILE else max(1, block_head // 64),
        num_stages=num_stages,
    )
    return out
