"""Weights rounded for the least error of the output, beside rounding each to the nearest."""

import pytest
import torch
from torch import Tensor

from engine.quantization.fp8 import dequantized, power_of_two_scale, quantized
from engine.quantization.rounding import BLOCK_INPUTS, round_weight

NUM_OUTPUTS = 24


def random_weight(num_inputs: int, *, seed: int = 0) -> Tensor:
    return torch.randn(NUM_OUTPUTS, num_inputs, generator=torch.Generator().manual_seed(seed))


def scale_of(weight: Tensor) -> float:
    return power_of_two_scale(float(weight.abs().max()))


def correlated(num_inputs: int, *, rank: int, noise: float = 0.05) -> Tensor:
    """Gram of inputs that are mixtures of few sources, each with a little noise of its own."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(rank, num_inputs, generator=generator) / rank**0.5
    return mixing.T @ mixing + noise**2 * torch.eye(num_inputs)


def output_error(rounded: Tensor, weight: Tensor, *, gram: Tensor) -> float:
    """Expected square error of the outputs, in float64."""
    difference = dequantized(rounded, scale_of(weight), torch.float32).double() - weight.double()
    return float(torch.einsum("oi,ij,oj->", difference, gram.double(), difference))


def rounded_weight(weight: Tensor, *, gram: Tensor) -> Tensor:
    return round_weight(weight, scale=scale_of(weight), gram=gram)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float8_e4m3fn
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


# Fewer inputs than are rounded at once, as many, more, and a number that leaves a short rest.
@pytest.mark.parametrize("num_inputs", [5, BLOCK_INPUTS, 2 * BLOCK_INPUTS, BLOCK_INPUTS + 37])
def test_error_on_correlated_inputs_is_far_below_that_of_nearest_rounding(num_inputs: int) -> None:
    weight, gram = random_weight(num_inputs), correlated(num_inputs, rank=num_inputs // 3 + 1)
    rounded = rounded_weight(weight, gram=gram)
    assert rounded.shape == weight.shape
    nearest = quantized(weight, scale_of(weight))
    assert output_error(rounded, weight, gram=gram) < 0.6 * output_error(nearest, weight, gram=gram)
    # Not for free: the weights themselves are further off.
    identity = torch.eye(num_inputs)
    assert output_error(rounded, weight, gram=identity) > output_error(
        nearest, weight, gram=identity
    )


def test_no_weight_moves_beyond_a_few_steps() -> None:
    weight = random_weight(200)
    rounded = rounded_weight(weight, gram=correlated(200, rank=50))
    kept = dequantized(rounded, scale_of(weight), torch.float32)
    assert (kept - weight).abs().max() < 0.5 * weight.abs().max()


@pytest.mark.parametrize("num_inputs", [40, BLOCK_INPUTS + 9])
def test_inputs_without_correlation_give_nearest_rounding(num_inputs: int) -> None:
    weight = random_weight(num_inputs)
    nearest = quantized(weight, scale_of(weight))
    assert_same(rounded_weight(weight, gram=torch.eye(num_inputs)), nearest)
    variances = torch.linspace(0.01, 100, num_inputs).diag()
    assert_same(rounded_weight(weight, gram=variances), nearest)


def test_weights_on_the_grid_stay() -> None:
    on_grid = dequantized(quantized(random_weight(60), 2.0**-6), 2.0**-6, torch.float32)
    rounded = round_weight(on_grid, scale=2.0**-6, gram=correlated(60, rank=9))
    assert torch.equal(dequantized(rounded, 2.0**-6, torch.float32), on_grid)


def test_fewer_samples_than_inputs_do_no_harm() -> None:
    weight, gram = random_weight(150), correlated(150, rank=3, noise=0.0)
    assert torch.linalg.matrix_rank(gram) == 3
    rounded = rounded_weight(weight, gram=gram)
    nearest = quantized(weight, scale_of(weight))
    assert output_error(rounded, weight, gram=gram) < 0.2 * output_error(nearest, weight, gram=gram)


def test_inputs_that_never_vary_do_no_harm() -> None:
    gram = correlated(60, rank=20)
    gram[:, [3, 59]] = 0
    gram[[3, 59], :] = 0
    weight = random_weight(60)
    rounded = rounded_weight(weight, gram=gram)
    nearest = quantized(weight, scale_of(weight))
    for silent in (3, 59):
        assert_same(rounded[:, silent], nearest[:, silent])
    assert output_error(rounded, weight, gram=gram) < 0.6 * output_error(nearest, weight, gram=gram)


def test_large_channels_do_no_harm() -> None:
    gains = torch.ones(60)
    gains[[7, 30]] = 1000
    gram = gains[:, None] * correlated(60, rank=20) * gains
    weight = random_weight(60)
    rounded = rounded_weight(weight, gram=gram)
    assert not rounded.float().isnan().any()
    nearest = quantized(weight, scale_of(weight))
    assert output_error(rounded, weight, gram=gram) <= output_error(nearest, weight, gram=gram)


def test_same_input_same_result_and_arguments_are_left_alone() -> None:
    weight, gram = random_weight(140), correlated(140, rank=30)
    kept = weight.clone(), gram.clone()
    first = rounded_weight(weight, gram=gram)
    assert_same(rounded_weight(weight, gram=gram), first)
    assert torch.equal(weight, kept[0])
    assert torch.equal(gram, kept[1])
