"""Whether a tower can run in 16 bit: its weights and activations against what float16 holds.

Knows nothing of FP8.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import QuantizationError

MAX_WEIGHT = torch.finfo(torch.float16).max  # 65,504
# Half of it: rows outside the sample may go beyond those in it.
MAX_ACTIVATION = 32_768.0

# What else flows through a tower lies between outputs of these.
_WATCHED = (nn.Linear, nn.LayerNorm, nn.Conv2d)


def check_weights(tower: nn.Module) -> None:
    """Raise QuantizationError unless all weights are finite in 16 bit."""
    for name, parameter in tower.named_parameters():
        largest = float(parameter.detach().abs().amax())
        if not math.isfinite(largest):
            raise QuantizationError(
                f"{name}: holds values that are not finite; the checkpoint is damaged, fetch it "
                "again"
            )
        if largest > MAX_WEIGHT:
            raise QuantizationError(f"{name}: its values reach {largest:.3g}, {_NO_WAY}")


@contextmanager
def watched_activations(tower: nn.Module) -> Iterator[None]:
    """Within the block, activations that float16 may not hold raise QuantizationError."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            low, high = torch.aminmax(output)
            largest = max(-float(low), float(high))
            if not largest <= MAX_ACTIVATION:  # NaN neither
                raise QuantizationError(f"{name}: activations reach {largest:.3g}, {_NO_WAY}")

        return hook

    with ExitStack() as hooks:
        for name, module in tower.named_modules():
            if isinstance(module, _WATCHED) or _is_block(name):
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        yield


_NO_WAY = (
    "float16 ends at 65,504: this checkpoint cannot run in 16 bit; embed with `clipmill embed "
    "--precision fp32`, which needs no build"
)


def _is_block(name: str) -> bool:
    return name.rpartition(".")[0].endswith(".blocks")
