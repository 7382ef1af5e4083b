"""Which attention kernel a shape gets, in which tiles, and how it rounds.

Knows nothing of the kernels' code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Tokens in a tile. Tensor cores want at least 16; Hopper's want 64.
_MIN_TILE, MAX_TILE = 16, 64
# What the resident kernel was measured with. Four tiles and a tail take 74 KiB of shared memory.
_RESIDENT_HEAD_WIDTH, _MAX_RESIDENT_TILES = 64, 4
# Exponents of the powers of two among float16's normal numbers.
_MIN_EXPONENT, _MAX_EXPONENT = -14, 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Which kernel a shape gets, and the tiles that its tokens are in."""

    is_resident: bool
    """Whether a program has all queries of a head."""
    tile: int
    """Tokens in a tile."""
    num_tiles: int
    """Of `tile` tokens; the last may have room left in the general kernel, not in the resident."""
    tail: int
    """Tokens that one more tile, the resident kernel's last, has room for; 0 without one."""


def tiling(
    length: int, *, head_width: int, has_bias: bool, is_rounded: bool, is_hopper: bool
) -> Tiling:
    """The resident kernel where it does what is asked and was measured, else the general one."""
    num_full, num_left = divmod(length, MAX_TILE)
    if (
        length > MAX_TILE
        and num_full <= _MAX_RESIDENT_TILES
        and num_left <= _MIN_TILE
        and head_width == _RESIDENT_HEAD_WIDTH
        and not has_bias
        and is_rounded
        and is_hopper
    ):
        tail = _MIN_TILE if num_left else 0
        return Tiling(is_resident=True, tile=MAX_TILE, num_tiles=num_full, tail=tail)
    tile = min(MAX_TILE, max(_MIN_TILE, 1 << (length - 1).bit_length()))
    return Tiling(is_resident=False, tile=tile, num_tiles=-(-length // tile), tail=0)


def rounding(
    factors: Sequence[float], *, is_rounded: bool, dtype: torch.dtype, is_interpreted: bool
) -> str:
    """The type that queries, keys and values are multiplied in and rounded from; or "none".

    Args:
        factors: Of the three.
        is_rounded: Whether they are rounded at all.
        dtype: Of what is read.
        is_interpreted: Whether Triton's interpreter runs.

    In float16, products with these powers of two are exact but where FP8 has its largest number
    or zero, and the GPU multiplies and rounds two numbers at a time. The interpreter can round to
    FP8 from float32 only.
    """
    if not is_rounded:
        return "none"
    is_exact = all(
        math.frexp(factor)[0] == 0.5 and 2.0**_MIN_EXPONENT <= factor <= 2.0**_MAX_EXPONENT
        for factor in factors
    )
    return "float16" if is_exact and dtype == torch.float16 and not is_interpreted else "float32"
