"""Plain max calibration: towers quantized in place, for tests of what executes them.

Knows nothing of how Clipmill chooses scales, nor which units it keeps in 16 bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.quantization.fp8 import (
    PROBABILITIES_SCALE,
    QuantizedLinear,
    QuantizedPoint,
    power_of_two_scale,
    quantized,
)
from engine.quantization.units import replace, units_of
from engine.towers import Tower


@torch.no_grad()
def quantize(
    tower: Tower,
    example: Tensor,
    *,
    is_kept: Callable[[int, str], bool] = lambda block, unit: False,
) -> None:
    """Quantize the units of a float32 tower, but those that `is_kept(block, unit)`."""
    with _largest_inputs(tower) as largest:
        tower(example)
    made: dict[str, nn.Module] = {}
    for unit in units_of(tower):
        _, _, block, _, kind = unit.name.split(".")
        if is_kept(int(block), kind):
            continue
        for point in unit.points:
            is_fixed = point.endswith("probabilities_point")
            scale = PROBABILITIES_SCALE if is_fixed else power_of_two_scale(largest[point])
            made[point] = QuantizedPoint(scale)
        for name in unit.layers:
            layer = tower.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            made[name] = _quantized_linear(layer)
    replace(tower, made)


def _quantized_linear(layer: nn.Linear) -> QuantizedLinear:
    scale = power_of_two_scale(float(layer.weight.abs().max()))
    return QuantizedLinear(quantized(layer.weight, scale), scale=scale, bias=layer.bias)


@contextmanager
def _largest_inputs(tower: Tower) -> Iterator[dict[str, float]]:
    largest: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[name] = float(inputs[0].abs().max())

        return record

    handles = [
        tower.get_submodule(point).register_forward_pre_hook(hook(point))
        for unit in units_of(tower)
        for point in unit.points
    ]
    yield largest
    for handle in handles:
        handle.remove()
