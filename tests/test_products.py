"""FP8 and 16-bit products against the layers that they join."""

import pytest
import torch
from torch import Tensor, nn

from engine.backends.products import join
from engine.errors import EngineError
from engine.quantization.fp8 import QuantizedLinear, QuantizedPoint, quantized
from engine.towers import QuantizationPoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_ROWS, WIDTH = 5, 48
HALF = torch.float16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
