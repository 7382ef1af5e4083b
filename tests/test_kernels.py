"""Norms and activations against PyTorch's, on the GPU or in Triton's interpreter."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from engine.quantization.fp8 import FP8, dequantized, quantized
from engine.towers import ACTIVATIONS
from tests.compiled_kernels import compiled
from tests.rounded import assert_rounded, normalized, random, random_norm
from tests.triton_device import DEVICE

from engine.backends.kernels import activate, post_norm, pre_norm  # isort: skip

NUM_ROWS, WIDTH = 13, 48
SCALE = 2.0**-6
DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("scale", [2.0**-9, 1.0, 2.0**3])
def test_no_activation_rounds_every_16_bit_number_as_engine_fp8_does(scale: float) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(torch.float16)
    x = x[~x.isnan()].view(-1, 2).to(DEVICE)
    found = activate(x, act="none", scale=scale)
    assert found.dtype == FP8
    torch.testing.assert_close(
        found.view(torch.uint8), quantized(x, scale).view(torch.uint8), rtol=0, atol=0
    )


def test_no_activation_keeps_nan() -> None:
    x = torch.tensor([[float("nan"), float("inf"), -1.0, 0.0]], dtype=torch.float16, device=DEVICE)
    found = activate(x, act="none", scale=1.0).float()
    assert found[0, 0].isnan()
    assert found[0, 1:].tolist() == [448.0, -1.0, 0.0]


def test_no_activation_leaves_16_bit_as_it_is() -> None:
    x = random(NUM_ROWS, WIDTH, dtype=torch.float16)
    assert activate(x, act="none", scale=None) is x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, SCALE])
def test_pre_norm_of_the_first_block(dtype: torch.dtype, scale: float | None) -> None:
    x, norm = random(NUM_ROWS, WIDTH, dtype=dtype), random_norm(dtype, width=WIDTH)
    residual, out = pre_norm(x, None, layer_norm=norm, scale=scale)
    assert residual is x
    assert_rounded(out, normalized(x, norm), scale=scale, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("width", [16, WIDTH, 1536])
def test_pre_norm_adds_first(dtype: torch.dtype, scale: float | None, width: int) -> None:
    x = 9 * random(NUM_ROWS, width, dtype=dtype)
    delta = random(NUM_ROWS, width, dtype=dtype, seed=3)
    norm = random_norm(dtype, width=width)
    kept = x.clone()
    residual, out = pre_norm(x, delta, layer_norm=norm, scale=scale)
    torch.testing.assert_close(residual, x + delta, rtol=0, atol=0)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    assert_rounded(out, normalized(residual, norm), scale=scale, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_post_norm_gives_the_norm_twice(dtype: torch.dtype) -> None:
    x = random(NUM_ROWS, WIDTH, dtype=dtype)
    delta = random(NUM_ROWS, WIDTH, dtype=dtype, seed=3)
    norm = random_norm(dtype, width=WIDTH)
    exact = normalized(x + delta, norm)
    residual, out = post_norm(x, delta, layer_norm=norm, scale=SCALE)
    assert_rounded(residual, exact, scale=None, dtype=dtype)
    assert_rounded(out, exact, scale=SCALE, dtype=dtype)
    residual, out = post_norm(x, delta, layer_norm=norm, scale=None)
    assert residual is out
    assert_rounded(out, exact, scale=None, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_post_norm_of_what_is_summed_already(dtype: torch.dtype) -> None:
    x = random(NUM_ROWS, WIDTH, dtype=dtype)
    norm = random_norm(dtype, width=WIDTH)
    residual, out = post_norm(x, None, layer_norm=norm, scale=SCALE)
    assert_rounded(residual, normalized(x, norm), scale=None, dtype=dtype)
    assert_rounded(out, normalized(x, norm), scale=SCALE, dtype=dtype)


def test_norm_of_large_rows_in_16_bit() -> None:
    # Squares of these exceed float16, and their mean is a hundred times what they vary by.
    x = 2000 + 20 * random(NUM_ROWS, WIDTH, dtype=torch.float16)
    norm = random_norm(torch.float16, width=WIDTH)
    _, out = pre_norm(x, None, layer_norm=norm, scale=None)
    torch.testing.assert_close(out.float(), normalized(x, norm), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, SCALE])
def test_activations(act: str, dtype: torch.dtype, scale: float | None) -> None:
    x = 2 * random(NUM_ROWS, WIDTH, dtype=dtype)
    found = activate(x, act=act, scale=scale)
    assert_rounded(found, ACTIVATIONS[act](x.float()), scale=scale, dtype=dtype)


def test_the_gated_activation() -> None:
    x = 2 * random(NUM_ROWS, 2 * WIDTH, dtype=torch.float16)
    gates, values = x.float().chunk(2, dim=1)
    found = activate(x, act="swiglu", scale=SCALE)
    assert_rounded(found, functional.silu(gates) * values, scale=SCALE, dtype=x.dtype)


def test_more_values_than_one_program_holds() -> None:
    x = random(300, WIDTH, dtype=torch.float16)
    found = dequantized(activate(x, act="relu", scale=SCALE), SCALE, torch.float32)
    torch.testing.assert_close(found, x.float().relu(), rtol=0.0626, atol=SCALE * 2.0**-10)


COMPILE = """
import torch

from engine.backends import kernels
from tests.compiled_kernels import CompiledKernel

kernels._activate_kernel = CompiledKernel(kernels._activate_kernel)
x = torch.empty(64, 128, dtype=torch.half, device="meta")
for act in ("none", "quick_gelu", "gelu", "gelu_new", "silu", "relu", "swiglu"):
    for scale in (2.0**-6, None):
        kernels.activate(x, act=act, scale=scale)
"""


def test_activations_compile(tmp_path: Path) -> None:
    assert len(compiled(COMPILE, cache_dir=tmp_path)) == 2 * 7 - 1  # none of 16 bit: no kernel


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["quick_gelu", "gelu_pytorch_tanh", "silu"])
def test_activations_of_fp8_are_off_by_little_but_their_rounding(act: str) -> None:
    x = torch.linspace(-20, 20, 2**14).view(-1, 64).to(DEVICE, torch.float16)
    exact = ACTIVATIONS[act](x.double())
    found = dequantized(activate(x, act=act, scale=2.0**-4), 2.0**-4, torch.float32)
    half_step = torch.maximum(exact.abs() * 2.0**-4, torch.tensor(2.0**-4 * 2.0**-10))
    assert ((found - exact).abs() <= x.double().abs() * 2.0**-12 + half_step).all()
