"""Plain max calibration: towers quantized in place, for tests of what executes them.

Knows nothing of how Clipmill chooses scales, nor which units it keeps in 16 bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.fp8 import (
    PROBABILITIES_SCALE,
    QuantizedLinear,
    QuantizedPoint,
    points,
    power_of_two_scale,
    quantized,
    replace,
)
from engine.towers import Tower

# Unit of a block -> its points and its linear layers.
UNITS = {
    "qkv": (("attention.input_point",), ("attention.query", "attention.key", "attention.value")),
    "products": (
        tuple(f"attention.{name}_point" for name in ("query", "key", "probabilities", "value")),
        (),
    ),
    "output": (("attention.output_point",), ("attention.output",)),
    "fc1": (("feed_forward.fc1_point",), ("feed_forward.fc1",)),
    "fc2": (("feed_forward.fc2_point",), ("feed_forward.fc2",)),
}


@torch.inference_mode()
def quantize(
    tower: Tower,
    example: Tensor,
    *,
    is_kept: Callable[[int, str], bool] = lambda block, unit: False,
) -> None:
    """Quantize the units of a float32 tower, but those that `is_kept(block, unit)`."""
    with _largest_inputs(tower) as largest:
        tower(example)
    num_blocks = len(list(tower.backbone.get_submodule("blocks")))
    for block in range(num_blocks):
        for unit, (point_names, layer_names) in UNITS.items():
            if is_kept(block, unit):
                continue
            prefix = f"backbone.blocks.{block}."
            for name in point_names:
                scale = power_of_two_scale(largest[prefix + name])
                if name == "attention.probabilities_point":
                    scale = PROBABILITIES_SCALE
                replace(tower, prefix + name, QuantizedPoint(scale))
            for name in layer_names:
                layer = tower.get_submodule(prefix + name)
                assert isinstance(layer, nn.Linear)
                replace(tower, prefix + name, _quantized_linear(layer))


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

    handles = [point.register_forward_pre_hook(hook(name)) for name, point in points(tower)]
    yield largest
    for handle in handles:
        handle.remove()
