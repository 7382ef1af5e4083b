"""FP8 and 16-bit products against the layers that they join."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine.errors import EngineError
from engine.quantization.fp8 import FP8, QuantizedLinear, QuantizedPoint, quantized
from engine.towers import ACTIVATIONS, QuantizationPoint
from tests.triton_device import DEVICE

from engine.backends.product_kernel import is_faster, multiply_and_activate  # isort: skip
from engine.backends.products import join  # isort: skip

NUM_ROWS, WIDTH = 5, 48
HALF = torch.float16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_name(act: str) -> Callable[[Tensor], Tensor]:
    return ACTIVATIONS.get(act, lambda x: x)


def quantized_linear(num_outputs: int, *, scale: float, bias: Tensor | None) -> QuantizedLinear:
    weight = 100 * scale * random(num_outputs, WIDTH, seed=num_outputs)
    half_bias = None if bias is None else bias.to(HALF)
    return QuantizedLinear(quantized(weight, scale), scale=scale, bias=half_bias).to(DEVICE)


def test_fp8_product_of_layers_with_scales_of_their_own() -> None:
    layers = [
        quantized_linear(num_outputs, scale=scale, bias=bias)
        for num_outputs, scale, bias in (
            (32, 2.0**-9, 3 * random(32, seed=1)),
            (48, 2.0**-12, random(48, seed=2)),
            (16, 2.0**-10, None),
        )
    ]
    product = join(*layers, point=QuantizedPoint(2.0**-6), dtype=HALF)
    assert product.input_scale == 2.0**-6
    assert product.factors == (8.0, 1.0, 4.0)
    x = quantized(random(NUM_ROWS, WIDTH), 2.0**-6).to(DEVICE)
    found = product(x)
    assert found.dtype == HALF
    assert found.shape == (NUM_ROWS, 96)
    parts = found.float().split([32, 48, 16], dim=1)
    for layer, part, factor in zip(layers, parts, product.factors, strict=True):
        expected = x.double() * 2.0**-6 @ (layer.weight.double() * layer.scale)
        if layer.bias is not None:
            expected += layer.bias.double()
        torch.testing.assert_close(part * factor, expected.float(), rtol=2e-3, atol=2e-3)


def test_fp8_product_in_bfloat16() -> None:
    layer = quantized_linear(32, scale=2.0**-9, bias=None)
    x = quantized(random(NUM_ROWS, WIDTH), 2.0**-6).to(DEVICE)
    found = join(layer, point=QuantizedPoint(2.0**-6), dtype=torch.bfloat16)(x)
    assert found.dtype == torch.bfloat16
    expected = x.float() * 2.0**-6 @ (layer.weight.float() * layer.scale)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_16_bit_product(bias: bool) -> None:
    layers = [
        nn.Linear(WIDTH, num_outputs, bias=bias, device=DEVICE, dtype=HALF).requires_grad_(False)
        for num_outputs in (32, 24)
    ]
    product = join(*layers, point=QuantizationPoint(), dtype=HALF)
    assert product.input_scale is None
    assert product.factors == (1.0, 1.0)
    x = random(NUM_ROWS, WIDTH).to(DEVICE, HALF)
    expected = torch.cat([layer(x) for layer in layers], dim=1)
    torch.testing.assert_close(product(x), expected, rtol=2e-3, atol=2e-3)


def test_widths_that_fp8_products_do_not_take() -> None:
    layer = quantized_linear(24, scale=1.0, bias=None)
    with pytest.raises(EngineError, match=r"48 x 24 cannot .* multiples of 16.* --precision fp16"):
        join(layer, point=QuantizedPoint(1.0), dtype=HALF)


@pytest.mark.parametrize(
    ("act", "scale"),
    [(name, 2.0**-6) for name in (*ACTIVATIONS, "none")] + [("quick_gelu", None), ("none", None)],
)
def test_activated_product(act: str, scale: float | None) -> None:
    layer = quantized_linear(32, scale=2.0**-9, bias=random(32, seed=1))
    product = join(layer, point=QuantizedPoint(2.0**-6), dtype=HALF)
    x = quantized(random(NUM_ROWS, WIDTH), 2.0**-6).to(DEVICE)
    found = product.activated(x, act=act, scale=scale)
    assert found.dtype == (HALF if scale is None else FP8)
    expected = by_name(act)(product(x).float()) * (1.0 if scale is None else 1 / scale)
    torch.testing.assert_close(found.float(), expected, rtol=2.0**-4, atol=2e-3)


@pytest.mark.parametrize("scale", [2.0**-6, None])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "none"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((5, 48, 32), id="less than a tile"),
        pytest.param((300, 160, 304), id="tiles that are not full"),
    ],
)
def test_the_kernel_multiplies_and_activates(
    shape: tuple[int, int, int], act: str, scale: float | None
) -> None:
    num_rows, num_terms, num_columns = shape
    x = quantized(random(num_rows, num_terms), 2.0**-6).to(DEVICE)
    weight = quantized(random(num_columns, num_terms, seed=1), 2.0**-6).to(DEVICE)
    bias = random(num_columns, seed=2).to(DEVICE, HALF)
    found = multiply_and_activate(
        x, weight, bias=bias, product_scale=2.0**-16, act=act, scale=scale
    )
    exact = by_name(act)((x.double() @ weight.double().T * 2.0**-16 + bias).float())
    if scale is None:
        assert found.dtype == HALF
        torch.testing.assert_close(found.float(), exact, rtol=2e-3, atol=1e-3)
        return
    assert found.dtype == FP8
    rounded = quantized(exact, scale).float()
    # On tensor cores, sums of FP8 are rounded to about 14 bits of the largest terms: that may tip
    # what is nearly a tie, and is much of what is nearly zero.
    assert (found.float() != rounded).float().mean() < 0.02
    terms = x.float().abs() @ weight.float().abs().T * 2.0**-16 / scale
    assert ((found.float() - rounded).abs() <= 2.0**-3 * rounded.abs() + 2.0**-12 * terms).all()


def test_the_kernel_keeps_nan_and_stays_in_range() -> None:
    # Triton's interpreter takes FP8's NaN for a number, so that it comes by the bias.
    found = multiply_and_activate(
        torch.full((2, 16), 448.0, device=DEVICE).to(FP8),
        torch.full((16, 16), 448.0, device=DEVICE).to(FP8),
        bias=torch.tensor([float("nan")] + 15 * [0.0], dtype=HALF, device=DEVICE),
        product_scale=1.0,
        act="relu",
        scale=1.0,
    ).float()
    assert found[:, 0].isnan().all()
    assert (found[:, 1:] == 448.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["quick_gelu", "none"])
def test_activated_product_in_one_kernel_and_in_two(act: str) -> None:
    layer = quantized_linear(4096, scale=2.0**-9, bias=random(4096, seed=1))
    product = join(layer, point=QuantizedPoint(2.0**-6), dtype=HALF)
    x = quantized(random(4096, WIDTH), 2.0**-6).to(DEVICE)
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    assert is_faster(x, num_columns=4096) == is_hopper
    assert not is_faster(x[:16], num_columns=4096)
    found = product.activated(x, act=act, scale=2.0**-6).float()
    parts = [product.activated(x[row : row + 16], act=act, scale=2.0**-6) for row in (0, 99)]
    for row, part in zip((0, 99), parts, strict=True):
        differs = found[row : row + 16] != part.float()
        assert differs.float().mean() < 0.02


def test_a_sum_that_is_left_to_the_next_norm() -> None:
    layer = quantized_linear(32, scale=2.0**-9, bias=random(32, seed=1))
    half = nn.Linear(WIDTH, 32, device=DEVICE, dtype=HALF).requires_grad_(False)
    values = random(NUM_ROWS, WIDTH).to(DEVICE)
    for product, x in (
        (join(layer, point=QuantizedPoint(2.0**-6), dtype=HALF), quantized(values, 2.0**-6)),
        (join(half, point=QuantizationPoint(), dtype=HALF), values.to(HALF)),
    ):
        residual = random(NUM_ROWS, 32, seed=3).to(DEVICE, HALF)
        before = residual.clone()
        found, delta = product.summed(x, residual=residual)
        assert found is residual
        torch.testing.assert_close(residual, before, rtol=0, atol=0)
        assert delta is not None
        torch.testing.assert_close(delta, product(x), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_sum_in_the_product() -> None:
    width, num_rows = 768, 25_600
    weight = quantized(100 * 2.0**-9 * random(width, width), 2.0**-9)
    layer = QuantizedLinear(weight, scale=2.0**-9, bias=random(width, seed=1).to(HALF)).to(DEVICE)
    product = join(layer, point=QuantizedPoint(2.0**-6), dtype=HALF)
    x = quantized(random(num_rows, width), 2.0**-6).to(DEVICE)
    residual = 10 * random(num_rows, width, seed=3).to(DEVICE, HALF)
    expected = residual + product(x)
    found, delta = product.summed(x, residual=residual)
    assert found is residual
    # It is Hopper's.
    assert (delta is None) == (torch.cuda.get_device_capability()[0] == 9)
    total = found if delta is None else found + delta
    torch.testing.assert_close(total, expected, rtol=2e-3, atol=0.05)
