"""Estimated losses of units beside losses measured one by one, and operations counted by hand."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from engine.families.clip import ImageBackbone
from engine.quantization.fp8 import QuantizedLinear, QuantizedPoint, power_of_two_scale, quantized
from engine.quantization.sensitivity import UnitCost, unit_costs
from engine.quantization.units import Unit, replace, units_of
from engine.towers import ImageTower, Normalize

WIDTH, HIDDEN, NUM_TOKENS, NUM_ROWS = 32, 48, 17, 64
IMAGE_SIZE, PATCH_SIZE = 32, 8

Quantized = Callable[[Unit], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def tower() -> ImageTower:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    made = ImageTower(
        normalize=Normalize(mean=(0.5,) * 3, std=(0.3,) * 3, rescale_factor=1 / 255),
        backbone=ImageBackbone(config),
        projection=nn.Linear(WIDTH, 24, bias=False),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return made.eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    shape = (NUM_ROWS, IMAGE_SIZE, IMAGE_SIZE, 3)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def quantizing(tower: nn.Module, pixels: Tensor) -> Quantized:
    """Quantizes units of the tower in place, by the ranges that they have on the pixels."""
    ranges: dict[str, float] = {}
    hooks = [
        tower.get_submodule(point).register_forward_pre_hook(
            lambda _, inputs, point=point: ranges.update({point: float(inputs[0].abs().max())})
        )
        for unit in units_of(tower)
        for point in unit.points
    ]
    with torch.inference_mode():
        tower(pixels)
    for hook in hooks:
        hook.remove()

    @contextmanager
    def quantize(unit: Unit) -> Iterator[None]:
        originals = {name: tower.get_submodule(name) for name in (*unit.points, *unit.layers)}
        modules: dict[str, nn.Module] = {
            point: QuantizedPoint(power_of_two_scale(ranges[point])) for point in unit.points
        }
        for name in unit.layers:
            layer = originals[name]
            scale = power_of_two_scale(float(layer.weight.abs().max()))
            modules[name] = QuantizedLinear(
                quantized(layer.weight.detach(), scale), scale=scale, bias=layer.bias
            )
        replace(tower, modules)
        yield
        replace(tower, originals)

    return quantize


def costs_of(tower: ImageTower, pixels: Tensor, *, seed: int = 0) -> list[UnitCost]:
    return unit_costs(
        tower,
        pixels.split(16),
        units=units_of(tower),
        quantized=quantizing(tower, pixels),
        seed=seed,
    )


@torch.inference_mode()
def measured_losses(tower: ImageTower, pixels: Tensor) -> dict[str, float]:
    """Mean 1 - cosine with one unit quantized, in float64."""
    quantize, exact = quantizing(tower, pixels), tower(pixels).double()
    losses = {}
    for unit in units_of(tower):
        with quantize(unit):
            losses[unit.name] = float(1 - (tower(pixels).double() * exact).sum(dim=1).mean())
    return losses


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


def test_estimates_are_close_to_losses_measured_one_by_one(
    tower: ImageTower, pixels: Tensor
) -> None:
    measured = measured_losses(tower, pixels)
    costs = costs_of(tower, pixels)
    assert [cost.unit for cost in costs] == list(measured)
    ratios = {cost.unit: cost.loss / measured[cost.unit] for cost in costs}
    assert all(2 / 3 < ratio < 3 / 2 for ratio in ratios.values()), ratios
    correlation = torch.corrcoef(
        torch.stack([ranks([cost.loss for cost in costs]), ranks(list(measured.values()))])
    )
    assert correlation[0, 1] > 0.9
    # The units differ by enough for a rank to mean something.
    assert max(measured.values()) > 4 * min(measured.values())


def test_shares_by_hand(tower: ImageTower, pixels: Tensor) -> None:
    counted = {
        "qkv": NUM_TOKENS * 3 * WIDTH * WIDTH,
        "products": 2 * NUM_TOKENS * NUM_TOKENS * WIDTH,
        "output": NUM_TOKENS * WIDTH * WIDTH,
        "fc1": NUM_TOKENS * WIDTH * HIDDEN,
        "fc2": NUM_TOKENS * HIDDEN * WIDTH,
    }
    costs = costs_of(tower, pixels[:16])
    for cost in costs:
        expected = counted[cost.unit.rpartition(".")[2]] / (2 * sum(counted.values()))
        assert cost.share == pytest.approx(expected)
    assert sum(cost.share for cost in costs) == pytest.approx(1)


def test_a_unit_that_loses_nothing_costs_nothing(tower: ImageTower, pixels: Tensor) -> None:
    @contextmanager
    def leave(unit: Unit) -> Iterator[None]:
        yield

    costs = unit_costs(tower, pixels[:32].split(16), units=units_of(tower), quantized=leave, seed=0)
    assert max(cost.loss for cost in costs) < 1e-12


def test_the_tower_is_left_as_it_was(tower: ImageTower, pixels: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    modules = dict(tower.named_modules())
    costs_of(tower, pixels[:16])
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    assert dict(tower.named_modules()) == modules
    assert not any(module._forward_hooks for module in tower.modules())


def test_frozen_weights_make_no_difference(tower: ImageTower, pixels: Tensor) -> None:
    costs = costs_of(tower, pixels[:16])
    tower.requires_grad_(False)
    try:
        frozen = costs_of(tower, pixels[:16])
    finally:
        tower.requires_grad_(True)
    assert [cost.loss for cost in frozen] == pytest.approx([cost.loss for cost in costs], rel=1e-4)


def test_same_seed_same_costs(tower: ImageTower, pixels: Tensor) -> None:
    costs = costs_of(tower, pixels[:16])
    assert costs_of(tower, pixels[:16]) == costs
    assert costs_of(tower, pixels[:16], seed=1) != costs
