"""Which attention kernel a shape gets, and in which tiles.

Knows nothing of the kernels' code.
"""

from dataclasses import dataclass

# Tokens in a tile. Tensor cores want at least 16; Hopper's want 64.
MIN_TILE, MAX_TILE = 16, 64
# Queries in the resident kernel's tail, where they are columns, of which there may be fewer. With
# 16, sums of 65 tokens were wrong on an H200 (Triton 3.6).
_TAIL = 8
# What the resident kernel was measured with. Four tiles and a tail take 55 KiB of shared memory.
_RESIDENT_HEAD_WIDTH, _MAX_RESIDENT_TILES = 64, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Which kernel a shape gets, and the tiles that its tokens are in."""

    is_resident: bool
    """Whether a program has all queries of a head that are wanted."""
    tile: int
    """Tokens in a tile."""
    num_tiles: int
    """Of `tile` tokens; the last may have room left in the general kernel, not in the resident."""
    tail: int
    """Queries that one more tile, the resident kernel's last, has room for; 0 without one."""


def tiling(
    length: int, *, head_width: int, has_bias: bool, is_fp8: bool, is_hopper: bool
) -> Tiling:
    """The resident kernel where it does what is asked and was measured, else the general one."""
    num_full, num_left = divmod(length, MAX_TILE)
    if (
        length > MAX_TILE
        and num_full <= _MAX_RESIDENT_TILES
        and num_left <= _TAIL
        and head_width == _RESIDENT_HEAD_WIDTH
        and not has_bias
        and is_fp8
        and is_hopper
    ):
        tail = _TAIL if num_left else 0
        return Tiling(is_resident=True, tile=MAX_TILE, num_tiles=num_full, tail=tail)
    tile = min(MAX_TILE, max(MIN_TILE, 1 << (length - 1).bit_length()))
    return Tiling(is_resident=False, tile=tile, num_tiles=-(-length // tile), tail=0)
