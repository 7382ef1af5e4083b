"""An FP8 product with the activation inside, as one persistent Triton kernel for Hopper.

Knows nothing of layers: tensors in, tensors out.

cuBLAS has no FP8 product that ends in quick GELU, so that its 16-bit output is written and read
once more. At 256 images of ViT-L/14 on an H200, one product for half a second, when the card is at
its power limit, fc1 and its activation took 522 us (cuBLAS without it 532), queries, keys and
values in FP8 367 (cuBLAS 381, in 16 bit 402).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.backends.kernels import activated, inverse, product_input, to_fp8

# Rows, columns and terms of a tile: sums in the registers of two warp groups, three tiles of terms
# on their way.
_TILE_ROWS, _TILE_COLUMNS, _TILE_TERMS = 128, 256, 128
_NUM_STAGES, _NUM_WARPS = 3, 8
# Rows of tiles that run at a time, so that they find the same weights in the L2 cache.
_GROUP_ROWS = 8


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x_tiles: tl.tensor,
    weight_tiles: tl.tensor,
    out_tiles: tl.tensor,
    bias_ptr: tl.tensor,
    num_rows: tl.tensor,
    product_scale: tl.tensor,
    inverse_scale: tl.tensor,
    act: tl.constexpr,
    num_columns: tl.constexpr,
    num_terms: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_terms: tl.constexpr,
    group_rows: tl.constexpr,
    num_programs: tl.constexpr,
    out_is_fp8: tl.constexpr,
    num_loads: tl.constexpr,
) -> None:
    """Each program has every `num_programs`-th tile of the output."""
    down = tl.cdiv(num_rows, tile_rows)
    across: tl.constexpr = (num_columns + tile_columns - 1) // tile_columns
    for tile in tl.range(tl.program_id(0), down * across, num_programs, flatten=True):
        first = tile // (group_rows * across) * group_rows
        group = tl.minimum(down - first, group_rows)
        row = (first + tile % (group_rows * across) % group) * tile_rows
        column = tile % (group_rows * across) // group * tile_columns
        total = tl.zeros([tile_rows, tile_columns], tl.float32)
        for term in tl.range(0, num_terms, tile_terms, num_stages=num_loads):
            x = x_tiles.load([row, term])
            weight = weight_tiles.load([column, term])
            total = tl.dot(x, weight.T, total)
        columns = column + tl.arange(0, tile_columns)
        bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0)
        y = total * product_scale + bias.to(tl.float32)[None, :]
        y = activated(y, act, out_is_fp8) * inverse_scale
        if out_is_fp8:
            out_tiles.store([row, column], to_fp8(y))
        else:
            out_tiles.store([row, column], y.to(bias.dtype))


def is_faster(x: Tensor, *, num_columns: int) -> bool:
    """Whether a kernel should do more than a product: on Hopper, with a tile for each processor.

    Elsewhere it was not measured, neither for activations nor for sums.
    """
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] != 9:
        return False
    return _num_tiles(len(x), num_columns) >= _num_processors(x.device)


def multiply_and_activate(
    x: Tensor, weight: Tensor, *, bias: Tensor, product_scale: float, act: str, scale: float | None
) -> Tensor:
    """act(product_scale * x @ weight.T + bias), for the next product.

    Args:
        x: FP8 [M, in].
        weight: FP8 [out, in].
        bias: 16 bit [out].
        product_scale: The operands' scales, multiplied.
        act: As in `engine.towers`, but not `swiglu`; or `none`.
        scale: Of the next product's FP8 input; None for the bias's 16-bit type.

    Returns:
        [M, out]. Sums are those of FP8 tensor cores, about 14 bits (arXiv 2412.19437); from there
        on float32.
    """
    (num_rows, num_terms), num_columns = x.shape, len(weight)
    out = product_input(bias.expand(num_rows, -1), scale)
    num_programs = min(_num_tiles(num_rows, num_columns), _num_processors(x.device))
    _product_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(x, [_TILE_ROWS, _TILE_TERMS]),
        TensorDescriptor.from_tensor(weight, [_TILE_COLUMNS, _TILE_TERMS]),
        TensorDescriptor.from_tensor(out, [_TILE_ROWS, _TILE_COLUMNS]),
        bias,
        num_rows,
        product_scale,
        inverse(scale),
        act=act,
        num_columns=num_columns,
        num_terms=num_terms,
        tile_rows=_TILE_ROWS,
        tile_columns=_TILE_COLUMNS,
        tile_terms=_TILE_TERMS,
        group_rows=_GROUP_ROWS,
        num_programs=num_programs,
        out_is_fp8=scale is not None,
        num_loads=_NUM_STAGES,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
    )
    return out


def _num_tiles(num_rows: int, num_columns: int) -> int:
    return -(-num_rows // _TILE_ROWS) * -(-num_columns // _TILE_COLUMNS)


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
