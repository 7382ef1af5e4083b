"""Attention against PyTorch's, on the GPU or in Triton's interpreter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.backends.attention_tiling import Tiling, tiling
from engine.quantization.fp8 import FP8, dequantized, quantized
from engine.towers import MASKED
from tests.compiled_kernels import compiled
from tests.triton_device import DEVICE, interpreter, tl

from engine.backends import attention_kernel  # isort: skip
from engine.backends.attention_kernel import HeadFactors, attend  # isort: skip

NUM_ROWS, NUM_HEADS = 2, 3
# Of results. On a GPU, sums of FP8 products have about 14 bits.
ATOL = 5e-3
PLAIN = HeadFactors(scores=0.25, mixed=1.0)
# Of queries, keys and values in FP8.
SCALE = 2.0**-6
ROUNDED = HeadFactors(scores=0.25 * SCALE**2, mixed=SCALE)
# The general kernel with room in its tile, without, and with more tiles; the resident one without
# a tail, with one, and with the most of both.
ONE_TILE, FULL_TILE, TWO_TILES, NO_TAIL, TAIL, LARGEST = 50, 64, 90, 128, 197, 264


def projections(length: int, *, head_width: int = 16, num_rows: int = NUM_ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    shape = (num_rows * length, 3 * NUM_HEADS * head_width)
    return torch.randn(shape, generator=generator).to(DEVICE, torch.float16)


def heads(qkv: Tensor, *, num_rows: int = NUM_ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, float32 [rows, heads, T, head width]."""
    split = qkv.float().view(num_rows, -1, 3, NUM_HEADS, qkv.shape[1] // 3 // NUM_HEADS)
    query, key, value = split.permute(2, 0, 3, 1, 4)
    return query, key, value


def joined(mixed: Tensor) -> Tensor:
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)


def by_sdpa(qkv: Tensor, *, mask: Tensor | None = None, num_rows: int = NUM_ROWS) -> Tensor:
    query, key, value = heads(qkv, num_rows=num_rows)
    return joined(
        functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.25)
    )


def by_sdpa_of_rounded(qkv: Tensor) -> Tensor:
    return by_sdpa(dequantized(quantized(qkv.float(), SCALE), SCALE, torch.float32))


def attended(
    qkv: Tensor,
    *,
    is_rounded: bool = False,
    bias: Tensor | None = None,
    num_rows: int = NUM_ROWS,
    scale: float | None = None,
) -> Tensor:
    """Of 16 bit, or of FP8 made of it; as 16 bit, or as FP8 of `scale`: float32."""
    found = attend(
        quantized(qkv, SCALE) if is_rounded else qkv,
        num_rows=num_rows,
        num_heads=NUM_HEADS,
        factors=ROUNDED if is_rounded else PLAIN,
        bias=bias,
        scale=scale,
        dtype=qkv.dtype,
    )
    return found.float() if scale is None else dequantized(found, scale, torch.float32)


# Below a tile, a whole one, two, one more, and head widths that are no power of two.
@pytest.mark.parametrize(
    ("length", "head_width"), [(1, 16), (5, 8), (50, 16), (64, 24), (128, 64), (129, 40)]
)
def test_attention_equals_scaled_dot_product_attention(length: int, head_width: int) -> None:
    qkv = projections(length, head_width=head_width)
    torch.testing.assert_close(attended(qkv), by_sdpa(qkv), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("length", [20, 70])
def test_a_bias_is_added_to_scores(length: int) -> None:
    qkv = projections(length)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(NUM_ROWS, 1, length, length, generator=generator).half().to(DEVICE)
    expected = by_sdpa(qkv, mask=bias.float())
    torch.testing.assert_close(attended(qkv, bias=bias), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("length", [7, 32, 70])
def test_a_bias_for_all_rows_masks_the_future(length: int) -> None:
    qkv = projections(length, head_width=64)
    future = torch.ones(80, 80, dtype=torch.bool, device=DEVICE).triu(1)
    bias = torch.zeros(80, 80, dtype=torch.float16, device=DEVICE).masked_fill(future, MASKED)
    cut = bias[:length, :length]  # not contiguous, as towers pass it
    expected = by_sdpa(qkv, mask=~future[:length, :length])
    torch.testing.assert_close(attended(qkv, bias=cut), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("length", [8, 64, 72])
def test_a_bias_for_each_row_masks_padding(length: int) -> None:
    qkv = projections(length, head_width=64)
    is_padding = torch.zeros(NUM_ROWS, 1, 1, length, dtype=torch.bool, device=DEVICE)
    is_padding[1, ..., length // 3 :] = True
    bias = is_padding.half() * MASKED
    expected = by_sdpa(qkv, mask=~is_padding)
    torch.testing.assert_close(attended(qkv, bias=bias), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("length", [8, 72])
def test_a_row_that_is_all_padding_sees_all_of_it(length: int) -> None:
    qkv = projections(length)
    bias = torch.full((NUM_ROWS, 1, 1, length), MASKED, dtype=torch.float16, device=DEVICE)
    torch.testing.assert_close(attended(qkv, bias=bias), by_sdpa(qkv), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("length", [20, TWO_TILES, TAIL])
def test_rows_do_not_see_each_other(length: int, is_rounded: bool) -> None:
    qkv = projections(length, head_width=64)
    changed = qkv.clone()
    changed[length:] += 1
    found, found_changed = (attended(x, is_rounded=is_rounded) for x in (qkv, changed))
    torch.testing.assert_close(found_changed[:length], found[:length], rtol=0, atol=0)
    assert not torch.allclose(found_changed[length:], found[length:])
    alone = attended(qkv[:length], is_rounded=is_rounded, num_rows=1)
    torch.testing.assert_close(alone, found[:length], rtol=0, atol=0)


@pytest.mark.parametrize("length", [ONE_TILE, TWO_TILES, TAIL])
def test_nothing_is_written_beyond_the_result(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = projections(length, head_width=64)
    room = torch.full((len(qkv) + 64, NUM_HEADS * 64), 7.0, dtype=qkv.dtype, device=DEVICE)
    monkeypatch.setattr(attention_kernel, "product_input", lambda x, scale, dtype: room[: len(x)])
    attended(qkv, is_rounded=True)
    assert (room[: len(qkv)] != 7.0).any(dim=1).all()
    assert (room[len(qkv) :] == 7.0).all()


def test_large_scores_do_not_overflow() -> None:
    qkv = 100 * projections(20)
    torch.testing.assert_close(attended(qkv), by_sdpa(qkv), rtol=2e-3, atol=0.1)


@pytest.mark.parametrize("length", [40, ONE_TILE, FULL_TILE, TWO_TILES, NO_TAIL, TAIL, LARGEST])
@pytest.mark.parametrize("scale", [None, 2.0**-4])
def test_fp8_queries_keys_and_values_and_rounding_of_the_result(
    length: int, scale: float | None
) -> None:
    qkv = projections(length, head_width=64)
    found = attended(qkv, is_rounded=True, scale=scale)
    rtol = 2e-3 if scale is None else 0.07
    torch.testing.assert_close(found, by_sdpa_of_rounded(qkv), rtol=rtol, atol=ATOL)


@pytest.mark.parametrize("head_width", [8, 24])
def test_fp8_where_heads_are_narrow(head_width: int) -> None:
    qkv = projections(20, head_width=head_width)
    found = attended(qkv, is_rounded=True)
    torch.testing.assert_close(found, by_sdpa_of_rounded(qkv), rtol=2e-3, atol=ATOL)


@pytest.mark.parametrize("length", [65, NO_TAIL, TAIL, LARGEST])
def test_both_kernels_compute_the_same(length: int) -> None:
    qkv = projections(length, head_width=64)
    # Only the general kernel adds a bias.
    bias = torch.zeros(1, 1, length, length, dtype=torch.float16, device=DEVICE)
    found = attended(qkv, is_rounded=True)
    expected = attended(qkv, is_rounded=True, bias=bias)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=ATOL)


@pytest.mark.parametrize("is_rounded", [False, True])
def test_one_tile_computes_what_more_tiles_do(is_rounded: bool) -> None:
    qkv = projections(ONE_TILE, head_width=64)
    longer = functional.pad(qkv.view(NUM_ROWS, ONE_TILE, -1), (0, 0, 0, 50), value=1.0)
    is_padding = torch.arange(ONE_TILE + 50, device=DEVICE) >= ONE_TILE
    bias = is_padding.half().view(1, 1, 1, -1) * MASKED
    expected = attended(longer.flatten(0, 1), is_rounded=is_rounded, bias=bias)
    expected = expected.view(NUM_ROWS, ONE_TILE + 50, -1)[:, :ONE_TILE].flatten(0, 1)
    torch.testing.assert_close(attended(qkv, is_rounded=is_rounded), expected, rtol=2e-3, atol=ATOL)


@pytest.fixture
def interpreter_keeps_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes FP8's NaN for 480."""
    convert = interpreter._convert_float

    def convert_from_fp8(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float8e4nv:
            return convert(x, source, target, mode)
        assert target == tl.float16
        stored = torch.from_numpy(np.ascontiguousarray(x).view("uint8")).view(FP8)
        return stored.half().view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", convert_from_fp8)


@pytest.mark.usefixtures("interpreter_keeps_nan")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN, in the interpreter
@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("length", [ONE_TILE, TWO_TILES, TAIL])
def test_nan_stays_nan_and_in_its_head(length: int, is_rounded: bool) -> None:
    qkv = projections(length, head_width=64)
    query, key, value = qkv.view(NUM_ROWS, length, 3, NUM_HEADS, 64).unbind(2)
    query[0, -1, 0, 5] = float("nan")
    key[0, 3, 1, 5] = float("nan")
    value[1, length - 2, 2, 5] = float("nan")
    expected = torch.zeros(NUM_ROWS, length, NUM_HEADS, 64, dtype=torch.bool, device=DEVICE)
    expected[0, -1, 0] = True
    expected[0, :, 1] = True
    expected[1, :, 2, 5] = True
    found = attended(qkv, is_rounded=is_rounded)
    assert torch.equal(found.isnan().view_as(expected), expected)


@pytest.mark.parametrize("length", [ONE_TILE, TWO_TILES, TAIL])
def test_fp8_between_bfloat16(length: int) -> None:
    qkv = projections(length, head_width=64).bfloat16()
    found = attended(qkv, is_rounded=True)
    torch.testing.assert_close(found, by_sdpa_of_rounded(qkv), rtol=1e-2, atol=1e-2)


def resident(num_tiles: int, *, tail: int) -> Tiling:
    return Tiling(is_resident=True, tile=64, num_tiles=num_tiles, tail=tail)


def general(num_tiles: int, *, tile: int) -> Tiling:
    return Tiling(is_resident=False, tile=tile, num_tiles=num_tiles, tail=0)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, general(1, tile=16)),
        (17, general(1, tile=32)),
        (32, general(1, tile=32)),
        (50, general(1, tile=64)),
        (64, general(1, tile=64)),
        (65, resident(1, tail=8)),
        (72, resident(1, tail=8)),
        (73, general(2, tile=64)),
        (128, resident(2, tail=0)),
        (196, resident(3, tail=8)),
        (197, resident(3, tail=8)),
        (256, resident(4, tail=0)),
        (257, resident(4, tail=8)),
        (264, resident(4, tail=8)),
        (265, general(5, tile=64)),
        (320, general(5, tile=64)),
        (577, general(10, tile=64)),
    ],
)
def test_tiling_of_heads_of_64_channels(length: int, expected: Tiling) -> None:
    found = tiling(length, head_width=64, has_bias=False, is_fp8=True, is_hopper=True)
    assert found == expected


def test_the_resident_kernel_is_for_what_it_can_do_and_was_measured_with() -> None:
    found = [
        tiling(257, head_width=80, has_bias=False, is_fp8=True, is_hopper=True),
        tiling(257, head_width=64, has_bias=True, is_fp8=True, is_hopper=True),
        tiling(257, head_width=64, has_bias=False, is_fp8=False, is_hopper=True),
        tiling(257, head_width=64, has_bias=False, is_fp8=True, is_hopper=False),
    ]
    assert found == 4 * [general(5, tile=64)]


# Compiles what `attend` would launch on cards that are not here; prints the bytes of shared memory.
COMPILE = """
import torch

from engine.backends import attention_kernel
from engine.backends.attention_kernel import HeadFactors, attend
from tests.compiled_kernels import CompiledKernel

for name in ("_general_kernel", "_resident_kernel"):
    setattr(attention_kernel, name, CompiledKernel(getattr(attention_kernel, name)))
factors = HeadFactors(scores=1.0, mixed=1.0)
for capability, length, head_width, has_bias in (
    (90, 257, 64, False), (90, 50, 16, False), (89, 77, 64, True), (120, 257, 64, False)
):
    CompiledKernel.capability = capability
    torch.cuda.get_device_capability = lambda device: divmod(capability, 10)
    half = torch.empty(length, 3 * head_width, dtype=torch.half, device="meta")
    bias = half.new_empty(length, length) if has_bias else None
    for qkv in (half.to(torch.float8_e4m3fn), half):
        attend(
            qkv, num_rows=1, num_heads=1, factors=factors, bias=bias, scale=1.0, dtype=torch.half
        )
"""


def test_kernels_compile_and_fit_into_the_shared_memory_of_cards(tmp_path: Path) -> None:
    printed = compiled(COMPILE, cache_dir=tmp_path)
    names, shared = zip(*(line.split() for line in printed), strict=True)
    assert names == ("_resident_kernel",) + 7 * ("_general_kernel",)
    # Three programs, each with a KiB for the driver, leave room for a fourth in Hopper's 228 KiB;
    # one program in others' 99.
    assert 4 * (int(shared[0]) + 1024) <= 228 * 1024
    assert max(map(int, shared[1:])) <= 99 * 1024


@pytest.mark.parametrize("num_queries", [1, 64, 65])
@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("length", [ONE_TILE, 65, TWO_TILES, NO_TAIL, TAIL])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_first_queries_alone(
    length: int,
    is_rounded: bool,
    num_queries: int,
    has_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Results of what is not wanted stay what memory had in it.
    monkeypatch.setattr(
        attention_kernel,
        "product_input",
        lambda x, scale, dtype: torch.full(x.shape, torch.nan, dtype=dtype, device=x.device),
    )
    qkv = projections(length, head_width=64)
    num_wanted = min(num_queries, length)
    found, expected = (
        attend(
            quantized(qkv, SCALE) if is_rounded else qkv,
            num_rows=NUM_ROWS,
            num_heads=NUM_HEADS,
            factors=ROUNDED if is_rounded else PLAIN,
            bias=random_bias(length) if has_bias else None,
            scale=None,
            dtype=qkv.dtype,
            num_queries=wanted,
        ).view(NUM_ROWS, length, -1)
        for wanted in (num_wanted, None)
    )
    assert not expected.isnan().any()
    wanted, others = found[:, :num_wanted], found[:, -(-num_wanted // 64) * 64 :]
    torch.testing.assert_close(wanted, expected[:, :num_wanted], rtol=0, atol=0)
    # A tail comes with the last tile before it, which may be the first.
    assert others.isnan().all() or length == 65


def random_bias(length: int) -> Tensor:
    bias = torch.randn(NUM_ROWS, 1, 1, length, generator=torch.Generator().manual_seed(1))
    return bias.to(DEVICE, torch.float16)
