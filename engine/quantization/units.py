"""The parts of a tower that are quantized together: its units.

Knows nothing of FP8 or of how a unit is quantized.

A unit is what may stay in 16 bit by itself: a linear layer with its input, query, key and value
with their common input, or the two products within attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from engine.towers import Units


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Points and layers of a tower, by name."""

    name: str
    """`backbone.blocks.3.attention.qkv`."""
    parent: str
    """The module that holds it: `backbone.blocks.3.attention`."""
    points: tuple[str, ...]
    """Quantization points."""
    layers: tuple[str, ...]
    """Linear layers; none for the products within attention."""


def units_of(tower: nn.Module) -> list[Unit]:
    """All units of a tower, in the order in which its modules were made."""
    found = []
    for parent, module in tower.named_modules():
        kinds: Units = getattr(module, "UNITS", {})
        for kind, (points, layers) in kinds.items():
            found.append(
                Unit(
                    name=f"{parent}.{kind}",
                    parent=parent,
                    points=tuple(f"{parent}.{point}" for point in points),
                    layers=tuple(f"{parent}.{layer}" for layer in layers),
                )
            )
    return found


def replace(tower: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put other modules under dotted names."""
    for name, module in modules.items():
        parent, _, attribute = name.rpartition(".")
        setattr(tower.get_submodule(parent), attribute, module)
