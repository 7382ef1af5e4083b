"""The demo checkpoint's towers through ModelOpt: scales, rounding, choice of units, refusals."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.accuracy import Agreement, Thresholds, agreement, row_cosines
from engine.errors import QuantizationError
from engine.quantization.fp8 import (
    PROBABILITIES_SCALE,
    QuantizedLinear,
    QuantizedPoint,
    dequantized,
    power_of_two_scale,
    quantized,
)
from engine.quantization.quantize import (
    JUDGING_ROWS,
    MIN_ROWS,
    QuantizedTower,
    _fewest_kept,
    quantize_tower,
)
from engine.quantization.sensitivity import UnitCost
from engine.quantization.units import units_of
from engine.towers import ImageTower, Normalize, QuantizationPoint, Tower
from tests.quantized import BATCH_ROWS, DEMO_THRESHOLDS, DemoTower, QuantizedDemo, embed, with_gains

MODALITIES = ("image", "text")
OUTLIERS = (5, 60, 100)
OTHERS = tuple(channel for channel in range(128) if channel not in OUTLIERS)


def inputs_of(tower: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """What enters each point and each linear layer of the blocks."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
        for name, module in tower.named_modules()
        if ".blocks." in name and isinstance(module, QuantizationPoint | QuantizedPoint | nn.Linear)
    ]
    with torch.inference_mode():
        tower(rows)
    for hook in hooks:
        hook.remove()
    return seen


def state(tower: nn.Module) -> dict[str, Any]:
    """All tensors and scales, comparable by ==."""
    tensors = {name: tensor.float().tolist() for name, tensor in tower.state_dict().items()}
    scales = {name: part.scale for name, part in tower.named_modules() if hasattr(part, "scale")}
    return tensors | {name: scale for name, scale in scales.items() if isinstance(scale, float)}


@pytest.fixture(scope="module")
def planted(quantized_demo: QuantizedDemo) -> tuple[DemoTower, Tower, QuantizedTower[Tower]]:
    """An image tower with channels a million times as large as others in block 1, quantized."""
    demo = quantized_demo.towers["image"]
    tower = with_gains(demo.original, block=1, channels=OUTLIERS, gain=2.0**10)
    tower = with_gains(tower, block=1, channels=OTHERS, gain=2.0**-10)
    return demo, tower, demo.quantize(tower)


@pytest.mark.parametrize("modality", MODALITIES)
def test_all_units_of_the_demo_are_fp8_within_the_thresholds(
    quantized_demo: QuantizedDemo, modality: str
) -> None:
    demo, result = quantized_demo.towers[modality], quantized_demo.quantized[modality]
    assert result.kept == ()
    assert result.costs == ()
    assert DEMO_THRESHOLDS.faults(result.agreement) == []
    judged = demo.sample[:JUDGING_ROWS]
    again = agreement(embed(result.fake_quantized, judged), embed(demo.original, judged))
    assert again.num_rows == result.agreement.num_rows == JUDGING_ROWS
    assert again.cosine_p1 == pytest.approx(result.agreement.cosine_p1, abs=1e-3)
    # Rows that were not in the sample come out as close, and not the same.
    reference, ours = embed(demo.original, demo.held_out), embed(result.tower, demo.held_out)
    assert Thresholds(min_neighbour_overlap=0.9).faults(agreement(ours, reference)) == []
    assert row_cosines(ours, reference).mean() < 0.99999


@pytest.mark.parametrize("modality", MODALITIES)
def test_fp8_modules_are_in_the_blocks_and_nowhere_else(
    quantized_demo: QuantizedDemo, modality: str
) -> None:
    tower = quantized_demo.quantized[modality].tower
    units = units_of(tower)
    points = {point for unit in units for point in unit.points}
    layers = {layer for unit in units for layer in unit.layers}
    for name, module in tower.named_modules():
        assert isinstance(module, QuantizedPoint) == (name in points)
        assert isinstance(module, QuantizedLinear) == (name in layers)
    assert len(layers) == 6 * len(units) / 5
    assert tower.dtype == torch.float32
    assert not any("quantizer" in name for name in tower.state_dict())
    assert not tower.training


@pytest.mark.parametrize("modality", MODALITIES)
def test_scales_come_from_the_largest_value_of_the_sample(
    quantized_demo: QuantizedDemo, modality: str
) -> None:
    demo, tower = quantized_demo.towers[modality], quantized_demo.quantized[modality].tower
    inputs = inputs_of(demo.original, demo.sample)
    for name, module in tower.named_modules():
        if name.endswith("probabilities_point"):
            assert module.scale == PROBABILITIES_SCALE
        elif isinstance(module, QuantizedPoint):
            assert module.scale == power_of_two_scale(float(inputs[name].abs().max()))
        elif isinstance(module, QuantizedLinear):
            weight = demo.original.get_submodule(name).weight.data
            assert module.scale == power_of_two_scale(float(weight.abs().max()))


def test_weights_are_rounded_for_the_inputs_of_the_sample(quantized_demo: QuantizedDemo) -> None:
    demo, tower = quantized_demo.towers["image"], quantized_demo.quantized["image"].tower
    inputs = inputs_of(demo.original, demo.sample)
    for unit in units_of(tower):
        for name in unit.layers:
            layer, weight = tower.get_submodule(name), demo.original.get_submodule(name).weight.data
            x = inputs[name].flatten(0, -2)
            ours, nearest = (
                float(((dequantized(stored, layer.scale, torch.float32) - weight) @ x.T).norm())
                for stored in (layer.weight.t(), quantized(weight, layer.scale))
            )
            assert ours < 0.9 * nearest, name


@pytest.mark.parametrize("modality", MODALITIES)
def test_each_module_does_what_modelopt_simulates(
    quantized_demo: QuantizedDemo, modality: str
) -> None:
    demo, result = quantized_demo.towers[modality], quantized_demo.quantized[modality]
    inputs = inputs_of(result.fake_quantized, demo.held_out[:32])
    names = [
        name
        for name, module in result.tower.named_modules()
        if isinstance(module, QuantizedPoint | QuantizedLinear)
    ]
    assert set(names) == set(inputs)
    for name in names:
        with torch.inference_mode():
            ours = result.tower.get_submodule(name)(inputs[name])
            theirs = result.fake_quantized.get_submodule(name)(inputs[name])
        if name.endswith("probabilities_point"):
            # A product with 448 there, a quotient by 1/448 here: values halfway between two FP8
            # numbers may go either way.
            assert (ours != theirs).float().mean() < 1e-3
        elif name.endswith("_point"):
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.max()))


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_tower_is_what_modelopt_simulates(quantized_demo: QuantizedDemo, modality: str) -> None:
    demo, result = quantized_demo.towers[modality], quantized_demo.quantized[modality]
    cosines = row_cosines(
        embed(result.tower, demo.held_out), embed(result.fake_quantized, demo.held_out)
    )
    # In a few rows a value lies so near the middle of two FP8 numbers that it goes either way.
    assert np.median(cosines) > 1 - 1e-6
    assert np.mean(cosines > 1 - 1e-5) > 0.9
    assert cosines.min() > 0.999


def test_a_hundredfold_channel_is_within_the_reach_of_fp8(quantized_demo: QuantizedDemo) -> None:
    demo = quantized_demo.towers["image"]
    tower = demo.original
    for block in range(4):
        tower = with_gains(tower, block=block, channels=OUTLIERS, gain=100)
    np.testing.assert_allclose(
        embed(tower, demo.held_out), embed(demo.original, demo.held_out), rtol=0, atol=1e-6
    )
    largest = inputs_of(tower, demo.sample)["backbone.blocks.1.attention.input_point"].abs()
    assert largest.amax() > 30 * largest.flatten(0, 1).amax(dim=0).median()
    result = demo.quantize(tower)
    assert Thresholds().faults(result.agreement) == []
    assert result.kept == ()
    ours, reference = embed(result.tower, demo.held_out), embed(tower, demo.held_out)
    assert Thresholds(min_neighbour_overlap=0.9).faults(agreement(ours, reference)) == []


def test_units_beyond_the_reach_of_fp8_stay_in_16_bit(
    planted: tuple[DemoTower, Tower, QuantizedTower[Tower]],
) -> None:
    demo, tower, result = planted
    assert np.array_equal(embed(tower, demo.held_out), embed(demo.original, demo.held_out))
    broken = ("backbone.blocks.1.attention.qkv", "backbone.blocks.1.feed_forward.fc1")
    assert set(result.kept) == set(broken)
    assert Thresholds().faults(result.agreement) == []
    for unit in units_of(tower):
        for point in unit.points:
            is_kept = isinstance(result.tower.get_submodule(point), QuantizationPoint)
            assert is_kept == (unit.name in broken)
        for name in unit.layers:
            layer = result.tower.get_submodule(name)
            assert isinstance(layer, QuantizedLinear) == (unit.name not in broken)
            if unit.name in broken:
                assert torch.equal(layer.weight, tower.get_submodule(name).weight)
    cosines = row_cosines(
        embed(result.tower, demo.held_out), embed(result.fake_quantized, demo.held_out)
    )
    assert np.median(cosines) > 1 - 1e-6


def test_costs_are_those_of_all_units_best_to_keep_first(
    planted: tuple[DemoTower, Tower, QuantizedTower[Tower]],
) -> None:
    _, tower, result = planted
    assert {cost.unit for cost in result.costs} == {unit.name for unit in units_of(tower)}
    gains = [cost.loss / cost.share for cost in result.costs]
    assert gains == sorted(gains, reverse=True)
    assert sum(cost.share for cost in result.costs) == pytest.approx(1)
    assert result.kept == tuple(cost.unit for cost in result.costs[: len(result.kept)])
    assert gains[1] > 10 * gains[2]


def test_stricter_thresholds_keep_more_and_no_more_than_needed(
    quantized_demo: QuantizedDemo,
) -> None:
    demo = quantized_demo.towers["text"]
    thresholds = Thresholds(min_cosine_p1=0.9995)
    result = demo.quantize(thresholds=thresholds)
    assert 0 < len(result.kept) < len(result.costs)
    assert thresholds.faults(result.agreement) == []
    # With one unit less in 16 bit, they are not met.
    layers = {unit.name: unit for unit in units_of(demo.original)}
    last = layers[result.kept[-1]]
    for name in (*last.points, *last.layers):
        module = result.fake_quantized.get_submodule(name)
        (module.input_quantizer if name.endswith("point") else module.weight_quantizer).enable()
    judged = demo.sample[:JUDGING_ROWS]
    less = agreement(embed(result.fake_quantized, judged), embed(demo.original, judged))
    assert thresholds.faults(less) != []


@pytest.mark.parametrize("needed", [1, 2, 37, 99, 100])
def test_as_few_units_as_needed_stay_in_16_bit(needed: int) -> None:
    # The loss falls off evenly, but what is measured does not follow it.
    costs = [UnitCost(unit=f"unit {n}", loss=1.0, share=0.01) for n in range(100)]
    judged: list[int] = []

    def judge(kept: Sequence[str]) -> Agreement:
        judged.append(len(kept))
        assert list(kept) == [f"unit {n}" for n in range(len(kept))]
        return agreement_of(0.995 if len(kept) >= needed else 0.985)

    kept, measured = _fewest_kept(
        costs,
        judge,
        measured=agreement_of(0.985),
        thresholds=Thresholds(),
        on_progress=lambda stage, done, total: None,
    )
    assert kept == tuple(f"unit {n}" for n in range(needed))
    assert measured == agreement_of(0.995)
    assert len(judged) == len(set(judged)) < 15


def agreement_of(cosine: float) -> Agreement:
    return Agreement(
        num_rows=512,
        cosine_mean=cosine,
        cosine_p1=cosine,
        cosine_min=cosine,
        neighbour_overlap=1.0,
    )


def test_same_input_same_result_said_to_the_caller_alone(
    quantized_demo: QuantizedDemo, capfd: pytest.CaptureFixture[str]
) -> None:
    demo, first = quantized_demo.towers["text"], quantized_demo.quantized["text"]
    before = state(demo.original)
    modules = dict(demo.original.named_modules())
    progress: list[tuple[str, int, int]] = []
    in_tf32: set[bool] = set()

    def on_progress(*step: Any) -> None:
        progress.append(step)
        in_tf32.add(torch.backends.cudnn.allow_tf32)

    second = demo.quantize(on_progress=on_progress)
    assert in_tf32 == {False}
    assert state(second.tower) == state(first.tower)
    assert second.agreement == first.agreement
    assert state(demo.original) == before
    assert dict(demo.original.named_modules()) == modules
    assert capfd.readouterr() == ("", "")
    num_batches, num_units = MIN_ROWS // BATCH_ROWS, 2 * 4
    assert progress == [
        *(("calibrate", done, num_batches) for done in range(num_batches + 1)),
        *(("round", done, num_units) for done in range(num_units + 1)),
        ("judge", 0, 0),
    ]


def test_rows_in_batches_of_any_size(quantized_demo: QuantizedDemo) -> None:
    demo, usual = quantized_demo.towers["text"], quantized_demo.quantized["text"]
    result = quantize_tower(
        demo.original,
        demo.sample.split([100, 1, 411]),
        thresholds=DEMO_THRESHOLDS,
        on_progress=lambda stage, done, total: None,
    )
    assert result.agreement.num_rows == JUDGING_ROWS
    for name, module in result.tower.named_modules():
        if isinstance(module, QuantizedPoint):
            assert module.scale == usual.tower.get_submodule(name).scale


def test_too_few_rows(quantized_demo: QuantizedDemo) -> None:
    demo = quantized_demo.towers["text"]
    with pytest.raises(
        QuantizationError, match="511 rows to calibrate with; at least 512 are need"
    ):
        quantize_tower(
            demo.original,
            [demo.sample[:511]],
            thresholds=DEMO_THRESHOLDS,
            on_progress=lambda stage, done, total: None,
        )


def test_a_tower_without_units(quantized_demo: QuantizedDemo) -> None:
    tower = ImageTower(
        normalize=Normalize(mean=(0.5,) * 3, std=(0.3,) * 3, rescale_factor=1 / 255),
        backbone=nn.Flatten(),
        projection=nn.Linear(12_288, 4),
    )
    with pytest.raises(QuantizationError, match="ImageTower has no unit that could be quantized"):
        quantized_demo.towers["image"].quantize(tower)


def test_thresholds_out_of_reach(quantized_demo: QuantizedDemo) -> None:
    steps: list[tuple[str, int, int]] = []
    with pytest.raises(
        QuantizationError,
        match=r"not close enough even with every unit in 16 bit: lowest cosine 1\.0000 is below 1$",
    ):
        quantized_demo.towers["text"].quantize(
            thresholds=Thresholds(min_cosine_min=1), on_progress=lambda *step: steps.append(step)
        )
    assert [step for step in steps if step[0].startswith("judge")] == [
        ("judge", 0, 0),
        ("judge with 10 of 10 units in 16 bit", 0, 0),
    ]


def nan_weight(block: nn.Module) -> None:
    block.feed_forward.fc1.weight[3, 4] = torch.nan


def infinite_weight(block: nn.Module) -> None:
    block.attention.value.weight[3, 4] = torch.inf


def dead_weight(block: nn.Module) -> None:
    block.attention.key.weight.zero_()


def dead_activation(block: nn.Module) -> None:
    block.norm2.weight.zero_()
    block.norm2.bias.zero_()


def large_residual(block: nn.Module) -> None:
    block.feed_forward.fc2.weight *= 1e5


def large_hidden(block: nn.Module) -> None:
    block.feed_forward.fc1.weight *= 1e4
    block.feed_forward.fc2.weight /= 1e4


def overflow(block: nn.Module) -> None:
    block.norm1.weight *= 6e4
    block.attention.query.weight *= 6e4


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (nan_weight, r"feed_forward\.fc1\.weight: holds values that are not finite; the checkp"),
        (infinite_weight, r"attention\.value\.weight: holds values that are not finite"),
        (dead_weight, r"attention\.key: always zero in the sample, so no scale can be found; the "),
        (dead_activation, r"feed_forward\.fc1_point: always zero in the sample"),
        (large_residual, r"feed_forward\.fc2: activations reach .*e\+0\d, float16 ends at 65,504"),
        (large_hidden, r"feed_forward\.fc1: activations reach .*; embed .*--precision fp32`"),
        (overflow, r"norm1: activations reach .*: this checkpoint cannot run in 16 bit"),
    ],
)
def test_what_does_not_allow_fp8_is_named(
    quantized_demo: QuantizedDemo, damage: Callable[[nn.Module], None], text: str
) -> None:
    demo = quantized_demo.towers["text"]
    tower = copy.deepcopy(demo.original)
    with torch.no_grad():
        damage(tower.get_submodule("backbone.blocks.1"))
    with pytest.raises(QuantizationError, match=rf"^backbone\.blocks\.1\.{text}"):
        demo.quantize(tower)
