"""Attention against PyTorch's, on the GPU or in Triton's interpreter."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.quantization.fp8 import dequantized, quantized
from engine.towers import MASKED
from tests.triton_device import DEVICE

from engine.backends.attention_kernel import HeadFactors, attend  # isort: skip

NUM_ROWS, NUM_HEADS = 2, 3
PLAIN = HeadFactors(is_rounded=False, query=1.0, key=1.0, value=1.0, scores=0.25, mixed=1.0)


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


def attended(qkv: Tensor, *, bias: Tensor | None = None, num_rows: int = NUM_ROWS) -> Tensor:
    return attend(
        qkv, num_rows=num_rows, num_heads=NUM_HEADS, factors=PLAIN, bias=bias, scale=None
    ).float()


# Below a tile, a whole one, one more than two, and head widths that are no power of two.
@pytest.mark.parametrize(("length", "head_width"), [(1, 16), (5, 8), (50, 16), (64, 24), (129, 40)])
def test_attention_equals_scaled_dot_product_attention(length: int, head_width: int) -> None:
    qkv = projections(length, head_width=head_width)
    torch.testing.assert_close(attended(qkv), by_sdpa(qkv), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("length", [7, 70])
def test_a_bias_for_all_rows_masks_the_future(length: int) -> None:
    qkv = projections(length)
    future = torch.ones(80, 80, dtype=torch.bool, device=DEVICE).triu(1)
    bias = torch.zeros(80, 80, dtype=torch.float16, device=DEVICE).masked_fill(future, MASKED)
    cut = bias[:length, :length]  # not contiguous, as towers pass it
    expected = by_sdpa(qkv, mask=~future[:length, :length])
    torch.testing.assert_close(attended(qkv, bias=cut), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("length", [8, 72])
def test_a_bias_for_each_row_masks_padding(length: int) -> None:
    qkv = projections(length)
    is_padding = torch.zeros(NUM_ROWS, 1, 1, length, dtype=torch.bool, device=DEVICE)
    is_padding[1, ..., length // 3 :] = True
    bias = is_padding.half() * MASKED
    expected = by_sdpa(qkv, mask=~is_padding)
    torch.testing.assert_close(attended(qkv, bias=bias), expected, rtol=2e-3, atol=2e-3)


def test_a_row_that_is_all_padding_stays_finite() -> None:
    qkv = projections(8)
    bias = torch.full((NUM_ROWS, 1, 1, 8), MASKED, dtype=torch.float16, device=DEVICE)
    assert attended(qkv, bias=bias).isfinite().all()


def test_rows_do_not_see_each_other() -> None:
    qkv = projections(20)
    changed = qkv.clone()
    changed[20:] += 1
    torch.testing.assert_close(attended(changed)[:20], attended(qkv)[:20], rtol=0, atol=0)
    assert not torch.allclose(attended(changed)[20:], attended(qkv)[20:])
    torch.testing.assert_close(attended(qkv[:20], num_rows=1), attended(qkv)[:20], rtol=0, atol=0)


def test_large_scores_do_not_overflow() -> None:
    qkv = 100 * projections(20)
    torch.testing.assert_close(attended(qkv), by_sdpa(qkv), rtol=2e-3, atol=0.1)


@pytest.mark.parametrize("scale", [None, 2.0**-4])
def test_rounding_of_queries_keys_and_values_and_of_the_result(scale: float | None) -> None:
    qkv = projections(40)
    # The product left queries half as large as they are, and values an eighth.
    left = (2.0, 1.0, 8.0)
    points = (2.0**-8, 2.0**-7, 2.0**-5)
    factors = HeadFactors(
        is_rounded=True,
        query=0.25 * left[0] / points[0],
        key=left[1] / points[1],
        value=left[2] / points[2],
        scores=points[0] * points[1],
        mixed=points[2],
    )
    found = attend(
        qkv, num_rows=NUM_ROWS, num_heads=NUM_HEADS, factors=factors, bias=None, scale=scale
    )
    query, key, value = (
        dequantized(quantized(x * factor, point), point, torch.float32)
        for x, factor, point in zip(heads(qkv), (0.25 * left[0], *left[1:]), points, strict=True)
    )
    expected = joined((query @ key.mT).softmax(dim=-1) @ value)
    if scale is None:
        torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    else:
        found = dequantized(found, scale, torch.float32)
        torch.testing.assert_close(found, expected, rtol=0.07, atol=2e-3)
