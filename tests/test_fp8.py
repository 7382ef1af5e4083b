"""FP8 modules against E4M3 written out by hand, float64 arithmetic, and ONNX Runtime."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from engine.export import export_image_tower
from engine.quantization.fp8 import (
    FP8,
    FP8_MAX,
    MIN_SCALE,
    PROBABILITIES_SCALE,
    QuantizedLinear,
    QuantizedPoint,
    dequantized,
    power_of_two_scale,
    quantized,
)
from engine.towers import ImageTower, Normalize

# By the format's definition, from +0 to 448: the value of a code is its place in the list. A zero
# exponent field has no leading one; the last code, which would be 480, is NaN.
FINITE = [
    (mantissa / 8 if exponent == 0 else 1 + mantissa / 8) * 2.0 ** (max(exponent, 1) - 7)
    for exponent in range(16)
    for mantissa in range(8)
][:-1]
NAN_CODE = 127
SIGN = 128


def nearest_code(x: float) -> int:
    """Code of the number nearest to x, ties to the even code, the largest beyond the range."""
    if math.isnan(x):
        return NAN_CODE
    distances = [abs(abs(x) - value) for value in FINITE] if abs(x) < FP8_MAX else []
    ties = [code for code, d in enumerate(distances) if d == min(distances)]
    code = next((code for code in ties if code % 2 == 0), ties[0]) if ties else len(FINITE) - 1
    return code + (SIGN if math.copysign(1, x) < 0 else 0)


def codes(x: Tensor, *, scale: float = 1.0) -> list[int]:
    return quantized(x, scale).view(torch.uint8).tolist()


def value(code: int) -> float:
    return math.copysign(FINITE[code % SIGN], -1 if code >= SIGN else 1)


def weight_of(out_width: int, in_width: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(out_width, in_width, generator=generator)).to(FP8)


def test_the_table_is_that_of_torch() -> None:
    all_codes = torch.arange(NAN_CODE, dtype=torch.uint8)
    assert all_codes.view(FP8).double().tolist() == FINITE
    assert torch.tensor([NAN_CODE], dtype=torch.uint8).view(FP8).isnan().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 2.0**6])
def test_every_number_midpoint_and_neighbour_rounds_to_nearest_even(
    sign: float, scale: float
) -> None:
    middles = [(low + high) / 2 for low, high in pairwise(FINITE)]
    exact = sign * scale * torch.tensor([*FINITE, *middles])
    up, down = (exact.nextafter(torch.tensor(bound)) for bound in (math.inf, -math.inf))
    x = torch.cat([exact, up, down])
    assert codes(x, scale=scale) == [nearest_code(float(each) / scale) for each in x]


def test_beyond_the_range_lies_the_largest_number_and_nan_stays_nan() -> None:
    x = torch.tensor([448.5, 464.0, 470.0, 1e30, math.inf])
    assert codes(x) == [len(FINITE) - 1] * len(x)
    assert codes(-x) == [len(FINITE) - 1 + SIGN] * len(x)
    assert codes(torch.tensor([math.nan])) == [NAN_CODE]


def test_zeros_and_what_rounds_to_zero_keep_their_sign() -> None:
    smallest = 2.0**-9
    x = torch.tensor([0.0, smallest / 2, -0.0, -smallest / 2, 0.75 * smallest])
    assert codes(x) == [0, 0, SIGN, SIGN, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_round_as_they_are(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(400, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert codes(x, scale=0.25) == [nearest_code(float(each) * 4) for each in x]


def test_dequantized_is_the_number_times_the_scale() -> None:
    x = torch.arange(NAN_CODE, dtype=torch.uint8).view(FP8)
    for scale in (2.0**-14, 1.0, 2.0**7):
        assert dequantized(x, scale, torch.float32).tolist() == [n * scale for n in FINITE]
    assert dequantized(x, 1.0, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("exponent", range(-14, 8))
def test_the_scale_is_the_smallest_power_of_two_that_holds_amax(exponent: int) -> None:
    power = 2.0**exponent
    amax = FP8_MAX * power
    assert power_of_two_scale(amax) == power
    # The numbers beside it, in float32 and in Python's own float.
    for up in (
        float(np.nextafter(np.float32(amax), np.float32(np.inf))),
        math.nextafter(amax, 1e9),
    ):
        assert power_of_two_scale(up) == 2 * power
    for down in (float(np.nextafter(np.float32(amax), np.float32(0))), math.nextafter(amax, 0)):
        assert power_of_two_scale(down) == power
    assert power_of_two_scale(1.01 * amax / 2) == power


def test_no_scale_is_too_small_for_float16() -> None:
    assert float(torch.finfo(torch.float16).smallest_normal) == MIN_SCALE
    assert power_of_two_scale(1e-6) == MIN_SCALE
    assert power_of_two_scale(5e-324) == MIN_SCALE


@pytest.mark.parametrize("scale", [2.0**-5, 1.0, PROBABILITIES_SCALE])
def test_a_point_rounds_what_passes_it(scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x = 100 * scale * torch.randn(2, 5, 40, generator=generator)
    passed = QuantizedPoint(scale)(x)
    assert passed.dtype == torch.float32
    expected = [value(code) * scale for code in codes(x.flatten(), scale=scale)]
    # One rounding of the product to float32, since 1/448 is no power of two.
    torch.testing.assert_close(
        passed.double().flatten(), torch.tensor(expected).double(), rtol=2**-23, atol=0
    )
    error = (passed - x).abs() / x.abs()
    assert error[x.abs() > scale * 2**-6].max() <= 2**-4  # half of the last of four bits
    assert torch.equal(QuantizedPoint(scale)(passed), passed)


def test_a_point_keeps_16_bit() -> None:
    x = torch.linspace(-3, 3, 101).half()
    assert QuantizedPoint(0.5)(x).dtype == torch.float16


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_against_float64(has_bias: bool) -> None:
    weight = weight_of(24, 40, seed=4)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(5)) if has_bias else None
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(6))
    made = QuantizedLinear(weight, scale=2.0**-4, bias=bias)(x)
    expected = x.double() @ (weight.double() * 2.0**-4).T
    if bias is not None:
        expected += bias.double()
    assert made.shape == (3, 7, 24)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_keeps_no_hold_of_the_bias_that_it_was_given() -> None:
    bias = nn.Parameter(torch.ones(4))
    layer = QuantizedLinear(weight_of(4, 4, seed=7), scale=1.0, bias=bias)
    assert layer.bias is not None
    layer.bias.data.zero_()
    assert bias.tolist() == [1.0] * 4


def test_16_bit_leaves_fp8_weights_alone() -> None:
    layer = QuantizedLinear(weight_of(8, 12, seed=8), scale=2.0**-6, bias=torch.full((8,), 1 / 3))
    before = layer.weight.view(torch.uint8).clone()
    tower = ImageTower(
        normalize=Normalize(mean=(0.5,) * 3, std=(0.3,) * 3, rescale_factor=1 / 255),
        backbone=nn.Sequential(nn.Flatten(), QuantizedPoint(0.125), layer),
        projection=nn.Linear(8, 4, bias=False),
    ).to_dtype(torch.float16)
    assert layer.weight.dtype == FP8
    assert torch.equal(layer.weight.view(torch.uint8), before)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    assert tower.dtype == torch.float16
    seen: list[torch.dtype] = []
    layer.register_forward_hook(
        lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype])
    )
    pixels = torch.arange(24, dtype=torch.uint8).view(2, 2, 2, 3)
    with torch.inference_mode():
        assert tower(pixels).dtype == torch.float32
    assert seen == [torch.float16] * 2


class Ratios(nn.Module):
    """uint8 [N, H, W, 3] -> the ratios of two channels, infinity and NaN among them, rounded."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.point = QuantizedPoint(scale)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.float()
        return self.point((x[..., 0] - 128) / x[..., 1])


class OneLayer(nn.Module):
    """uint8 [N, H, W, 3] -> one quantized layer of the values, between -16 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.point = QuantizedPoint(2.0**-2)
        weight = ((torch.arange(9 * 48) % 33 - 16) / 4).view(9, 48).to(FP8)
        self.layer = QuantizedLinear(weight, scale=2.0**-1, bias=torch.arange(9) / 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layer(self.point((pixels.flatten(1).float() - 128) / 8))


def exported(module: nn.Module, path: Path) -> onnxruntime.InferenceSession:
    export_image_tower(module, height=4, width=4, path=path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def bits(x: np.ndarray | Tensor) -> list[int]:
    x = np.asarray(x, dtype=np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.int32).flatten().tolist()


@pytest.mark.parametrize("scale", [2.0**-3, PROBABILITIES_SCALE])
def test_onnx_runtime_rounds_alike(tmp_path: Path, scale: float) -> None:
    pixels = np.random.default_rng(9).integers(0, 256, (500, 4, 4, 3), dtype=np.uint8)
    pixels[0, 0, 0], pixels[0, 0, 1], pixels[0, 0, 2] = (128, 0, 0), (129, 0, 0), (0, 0, 0)
    module = Ratios(scale)
    (embeddings,) = exported(module, tmp_path / "image.onnx").run(None, {"pixels": pixels})
    expected = module(torch.from_numpy(pixels))
    assert bits(embeddings) == bits(expected)
    top = np.float32(scale * FP8_MAX)
    np.testing.assert_array_equal(embeddings[0, 0, :3], np.array([np.nan, top, -top]))
    assert len(np.unique(embeddings)) > 100


def test_onnx_runtime_multiplies_alike(tmp_path: Path) -> None:
    # Values are multiples of 1/8 up to 16, weights up to 2: their sums are exact in float32,
    # whatever the order.
    pixels = np.random.default_rng(10).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    module = OneLayer()
    path = tmp_path / "image.onnx"
    (embeddings,) = exported(module, path).run(None, {"pixels": pixels})
    with torch.inference_mode():
        expected = module(torch.from_numpy(pixels))
    assert bits(embeddings) == bits(expected)
    graph = onnx.load(str(path)).graph
    (weight,) = (
        each for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT8E4M3FN
    )
    assert weight.dims == [48, 9]
    kinds = [node.op_type for node in graph.node if node.op_type != "Constant"]
    assert kinds[-4:] == ["DequantizeLinear", "DequantizeLinear", "MatMul", "Add"]
    assert kinds.count("QuantizeLinear") == 1
    assert "Transpose" not in kinds
