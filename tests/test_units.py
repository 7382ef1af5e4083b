"""The units of towers, and modules put into their places."""

import pytest
import torch
from torch import nn

from engine.quantization.units import Unit, replace, units_of
from engine.towers import BlockShape, PostNormBlock, PreNormBlock, QuantizationPoint

SHAPE = BlockShape(width=8, hidden_width=12, num_heads=2, act="gelu", norm_eps=1e-5)


def tower(block: type[PreNormBlock | PostNormBlock] = PreNormBlock) -> nn.Module:
    module = nn.Module()
    module.backbone = nn.Module()
    module.backbone.first = nn.Linear(8, 8)
    module.backbone.blocks = nn.ModuleList(block(SHAPE) for _ in range(2))
    module.projection = nn.Linear(8, 4)
    return module


@pytest.mark.parametrize("block", [PreNormBlock, PostNormBlock])
def test_units_of_blocks(block: type[PreNormBlock | PostNormBlock]) -> None:
    units = units_of(tower(block))
    kinds = ("attention.qkv", "attention.products", "attention.output")
    kinds += ("feed_forward.fc1", "feed_forward.fc2")
    assert [unit.name for unit in units] == [
        f"backbone.blocks.{number}.{kind}" for number in range(2) for kind in kinds
    ]
    attention = "backbone.blocks.1.attention"
    assert units[5] == Unit(
        name=f"{attention}.qkv",
        parent=attention,
        points=(f"{attention}.input_point",),
        layers=(f"{attention}.query", f"{attention}.key", f"{attention}.value"),
    )
    assert units[6].points == tuple(
        f"{attention}.{name}_point" for name in ("query", "key", "probabilities", "value")
    )
    assert units[6].layers == ()


def test_every_point_and_layer_of_the_blocks_is_in_just_one_unit() -> None:
    module = tower()
    named = [name for unit in units_of(module) for name in (*unit.points, *unit.layers)]
    there = [
        name
        for name, part in module.named_modules()
        if isinstance(part, QuantizationPoint | nn.Linear) and ".blocks." in name
    ]
    assert sorted(named) == sorted(there)
    assert len(set(named)) == len(named)


def test_a_tower_without_blocks_has_no_unit() -> None:
    assert units_of(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))) == []


def test_what_is_replaced_takes_part() -> None:
    module = tower()
    name = "backbone.blocks.1.feed_forward.fc2"
    zeros = nn.Linear(12, 8)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    replace(module, {name: zeros})
    assert module.get_submodule(name) is zeros
    with torch.inference_mode():
        mapped = module.get_submodule("backbone.blocks.1.feed_forward")(torch.ones(1, 3, 8))
    assert not mapped.any()
    # In the same place, so that tensors keep their names.
    names = [kind for kind, _ in module.get_submodule("backbone.blocks.1").named_parameters()]
    assert [
        kind for kind, _ in tower().get_submodule("backbone.blocks.1").named_parameters()
    ] == names


def test_nothing_is_put_where_there_is_no_parent() -> None:
    with pytest.raises(AttributeError):
        replace(tower(), {"backbone.blocks.7.attention.query": nn.Identity()})
