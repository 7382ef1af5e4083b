"""Where FP8 costs most: what quantizing each unit of a tower alone does to the embeddings.

Knows nothing of how a unit is quantized.

The loss of a unit is the 1 - cosine that its quantization adds to an embedding, to second order:
half the squared length of J d, with d the error at the output of the unit's module and J the
derivative of the embedding there. Random directions r estimate it (Hutchinson 1990): the mean of
(r J d)^2 over standard normal r is that squared length, and r J is one backward pass for all units
at once. Losses of units add up, since their errors hardly correlate.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.quantization.units import Unit

NUM_DIRECTIONS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCost:
    """What one unit costs in accuracy and saves in time."""

    unit: str
    """Name of the unit."""
    loss: float
    """Expected 1 - cosine that its quantization adds to an embedding."""
    share: float
    """Of the operations of all units: what FP8 does twice as fast there."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of a module that holds units."""

    inputs: tuple[Any, ...]
    """As they were given."""
    output: Tensor
    """What came of them."""
    gradients: list[Tensor]
    """At the output, one for each direction."""


def unit_costs(
    tower: nn.Module,
    batches: Iterable[Tensor],
    *,
    units: Sequence[Unit],
    quantized: Callable[[Unit], AbstractContextManager[None]],
    seed: int,
) -> list[UnitCost]:
    """Measure every unit on sampled inputs, in as many backward passes as there are directions.

    Args:
        tower: In float32, with no unit quantized; maps a batch to embeddings [N, D].
        batches: Inputs of the tower; a few rows each, since all activations are kept for a batch.
        units: Of the tower.
        quantized: Quantizes one unit for the length of a block.
        seed: Of the random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = dict.fromkeys([unit.name for unit in units], 0.0)
    operations = dict.fromkeys(losses, 0)
    num_rows = 0
    parents = {unit.parent: tower.get_submodule(unit.parent) for unit in units}
    for batch in batches:
        num_rows += len(batch)
        calls = _recorded(tower, batch, parents=parents, generator=generator)
        for unit in units:
            call = calls[unit.parent]
            operations[unit.name] += _operations(tower, unit, tokens=call.inputs[0])
            with torch.inference_mode(), quantized(unit):
                error = parents[unit.parent](*call.inputs) - call.output
            for gradient in call.gradients:
                effect = (gradient * error).flatten(1).sum(dim=1)
                losses[unit.name] += float(effect.square().sum()) / 2 / NUM_DIRECTIONS
    total = sum(operations.values())
    return [
        UnitCost(unit=name, loss=loss / num_rows, share=operations[name] / total)
        for name, loss in losses.items()
    ]


def _recorded(
    tower: nn.Module,
    batch: Tensor,
    *,
    parents: dict[str, nn.Module],
    generator: torch.Generator,
) -> dict[str, _Call]:
    """Run a batch forward once and backward once for each direction."""
    inputs: dict[str, tuple[Any, ...]] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing before the first module needs a gradient
                output = output.detach().requires_grad_()
            inputs[name], outputs[name] = given, output
            return output

        return hook

    with ExitStack() as hooks, torch.enable_grad():
        for name, module in parents.items():
            hooks.callback(module.register_forward_hook(record(name)).remove)
        embeddings = tower(batch)
        gradients = [
            torch.autograd.grad(
                embeddings,
                list(outputs.values()),
                torch.randn(embeddings.shape, generator=generator).to(embeddings.device),
                retain_graph=True,
            )
            for _ in range(NUM_DIRECTIONS)
        ]
    return {
        name: _Call(
            inputs=tuple(_detached(x) for x in inputs[name]),
            output=output.detach(),
            gradients=list(of_output),
        )
        for (name, output), of_output in zip(
            outputs.items(), zip(*gradients, strict=True), strict=True
        )
    }


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _operations(tower: nn.Module, unit: Unit, *, tokens: Tensor) -> int:
    """Multiplications of a unit for an input [N, T, width] of its module."""
    num_rows, length, width = tokens.shape
    if not unit.layers:  # query by key, probabilities by value
        return 2 * int(num_rows * length * length * width)
    layers: list[Any] = [tower.get_submodule(layer) for layer in unit.layers]
    return int(num_rows * length * sum(layer.weight.numel() for layer in layers))
