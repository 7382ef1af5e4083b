"""Quantizes a tower to FP8 with NVIDIA ModelOpt, and keeps in 16 bit what FP8 would cost too much.

Knows nothing of where the sample came from or of how the result is stored, exported or run.

The recipe: static per-tensor E4M3 for the inputs and weights of every linear layer of the blocks
and for the two products of attention, scales from the largest value in the sample, weights rounded
for the least error of the output. If the tower is then not as close to the original as asked for,
units go back to 16 bit, first those that gain most accuracy for the operations they cost.
"""

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.accuracy import Agreement, Embeddings, Thresholds, agreement
from engine.errors import QuantizationError
from engine.fp8 import (
    FP8_MAX,
    PROBABILITIES_SCALE,
    QuantizedLinear,
    QuantizedPoint,
    dequantized,
    power_of_two_scale,
)
from engine.half_precision import check_weights, watched_activations
from engine.rounding import round_weight
from engine.sensitivity import UnitCost, unit_costs
from engine.towers import QuantizationPoint, Tower
from engine.units import Unit, replace, units_of

with warnings.catch_warnings():
    # It warns of any transformers that it was not tested with (none of its transformers code runs),
    # and torch warns of torch.jit, which it uses.
    warnings.simplefilter("ignore", UserWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantInputBase, QuantModuleRegistry, TensorQuantizer

# Part of every fp8 engine's id. Raised whenever the same sample would give another engine.
RECIPE = "modelopt-max-gptq-1"
# A calibration with fewer rows misses too many of the rare large activations.
MIN_ROWS = 512
# Tokens of each row that enter the correlations of inputs, evenly spaced: 512 rows give ten times
# as many as the widest layer of a ViT-B has inputs.
TOKENS_PER_ROW = 64
# Rows on which units are ranked, and on which a choice of units is judged.
RANKING_ROWS, RANKING_BATCH_ROWS, JUDGING_ROWS = 32, 4, 128
FIRST_GUESS = 4  # units kept in 16 bit

E4M3 = {"num_bits": (4, 3), "axis": None}
MODELOPT_CONFIG = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*.blocks.*weight_quantizer", "cfg": E4M3, "enable": True},
        {"quantizer_name": "*_point.input_quantizer", "cfg": E4M3, "enable": True},
    ],
    "algorithm": None,  # calibrated apart
}

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class QuantizedTower:
    """A tower with FP8 modules in it, and how it came to be."""

    tower: Tower
    """Float32 but for its FP8 weights; its units are quantized but for those kept."""
    fake_quantized: nn.Module
    """ModelOpt's simulation of the same, float32: the reference for what executes it."""
    kept: tuple[str, ...]
    """Units in 16 bit, in the order of their ranking."""
    costs: tuple[UnitCost, ...]
    """Of every unit, the best to keep in 16 bit first; empty where nothing had to be kept."""
    agreement: Agreement
    """With the original, on the rows that judged the choice."""


def quantize_tower(
    tower: Tower,
    batches: Sequence[Tensor],
    *,
    thresholds: Thresholds,
    on_progress: OnProgress,
) -> QuantizedTower:
    """Calibrate, round and choose.

    Args:
        tower: Float32; left as it is. On the device that is to do the work.
        batches: The sample, uint8 [rows, H, W, 3] or int32 [rows, T] each.
        thresholds: How close the result must be to the original.
        on_progress: Called with a stage's name, and how many of how many steps are done.

    Raises:
        QuantizationError: Too few rows, a point or weight that is always zero or not finite,
            activations beyond 16 bit, or thresholds that no choice meets.
    """
    num_rows = sum(len(batch) for batch in batches)
    if num_rows < MIN_ROWS:
        raise QuantizationError(
            f"{num_rows} rows to calibrate with; at least {MIN_ROWS} are needed: bring a larger "
            "catalog, or one with fewer rejects"
        )
    units = units_of(tower)
    if not units:
        raise QuantizationError(f"{type(tower).__name__} has no unit that could be quantized")
    check_weights(tower)
    simulation = _Simulation(copy.deepcopy(tower), units=units)
    reference = simulation.calibrate(batches, on_progress=on_progress)
    simulation.round_weights(on_progress=on_progress)

    judging = _first_rows(batches, JUDGING_ROWS)
    expected = reference[: sum(len(batch) for batch in judging)]

    def judge(kept: Sequence[str]) -> Agreement:
        simulation.quantize_all_but(kept)
        return agreement(_embeddings(simulation.tower, judging), expected)

    kept: tuple[str, ...] = ()
    costs: list[UnitCost] = []
    on_progress("judge", 0, 1)
    best = judge(kept)
    on_progress("judge", 1, 1)
    if thresholds.faults(best):
        on_progress("rank", 0, 1)
        simulation.quantize_all_but([unit.name for unit in units])
        costs = unit_costs(
            simulation.tower,
            _in_batches(_first_rows(batches, RANKING_ROWS), RANKING_BATCH_ROWS),
            units=units,
            quantized=simulation.quantized,
            seed=0,
        )
        costs.sort(key=lambda cost: cost.loss / cost.share, reverse=True)
        on_progress("rank", 1, 1)
        ranked = [cost.unit for cost in costs]
        kept, best = _fewest_kept(ranked, judge, thresholds=thresholds, on_progress=on_progress)
    simulation.quantize_all_but(kept)
    return QuantizedTower(
        tower=simulation.quantized_copy(tower, kept=kept),
        fake_quantized=simulation.tower,
        kept=kept,
        costs=tuple(costs),
        agreement=best,
    )


def _fewest_kept(
    ranked: Sequence[str],
    judge: Callable[[Sequence[str]], Agreement],
    *,
    thresholds: Thresholds,
    on_progress: OnProgress,
) -> tuple[tuple[str, ...], Agreement]:
    """The shortest head of the ranking that, kept in 16 bit, meets the thresholds."""
    failed, count, num_judged = 0, min(FIRST_GUESS, len(ranked)), 0
    passed: tuple[int, Agreement] | None = None
    while passed is None or passed[0] - failed > 1:
        measured = judge(ranked[:count])
        num_judged += 1
        on_progress("choose", num_judged, 0)
        faults = thresholds.faults(measured)
        if not faults:
            passed = count, measured
        elif count == len(ranked):
            raise QuantizationError(
                f"not close enough even with every unit in 16 bit: {'; '.join(faults)}"
            )
        else:
            failed = count
        count = min(2 * failed, len(ranked)) if passed is None else (failed + passed[0]) // 2
    return tuple(ranked[: passed[0]]), passed[1]


class _Simulation:
    """ModelOpt's fake-quantized copy of a tower, whose units can be switched one by one."""

    def __init__(self, tower: Tower, *, units: Sequence[Unit]) -> None:
        self.tower = tower
        self._units = {unit.name: unit for unit in units}
        self._quantized: set[str] = set()
        self._scales: dict[str, float] = {}  # by point or layer
        self._grams: dict[str, Tensor] = {}  # by unit
        self._original: dict[str, Tensor] = {}  # weights, by layer
        self._rounded: dict[str, Tensor] = {}

    def calibrate(self, batches: Sequence[Tensor], *, on_progress: OnProgress) -> Embeddings:
        """Find the scales; returns the original's embeddings of the sample."""
        if QuantizationPoint not in QuantModuleRegistry:
            QuantModuleRegistry.register({QuantizationPoint: "QuantizationPoint"})(QuantInputBase)
        embeddings: list[Embeddings] = []
        correlations = {
            unit.points[0]: _Correlation() for unit in self._units.values() if unit.layers
        }

        def run_sample(converted: nn.Module) -> None:
            with ExitStack() as hooks:
                hooks.enter_context(watched_activations(converted))
                for name, module in converted.named_modules():
                    if name in correlations:
                        add = module.register_forward_pre_hook(correlations[name])
                        hooks.callback(add.remove)
                for number, batch in enumerate(batches):
                    on_progress("calibrate", number, len(batches))
                    embeddings.append(_embeddings(converted, [batch]))
            on_progress("calibrate", len(batches), len(batches))

        with redirect_stdout(io.StringIO()):  # it prints how many quantizers it made
            mtq.quantize(self.tower, MODELOPT_CONFIG)
        mtq.calibrate(self.tower, algorithm="max", forward_loop=run_sample)
        for name, quantizer in self._quantizers():
            scale = _scale(name, quantizer)
            self._scales[name] = scale
            quantizer.amax = torch.tensor(scale * FP8_MAX, device=quantizer.amax.device)
        self._grams = {
            unit.name: correlations[unit.points[0]].gram()
            for unit in self._units.values()
            if unit.layers
        }
        self._quantized = set(self._units)
        return np.concatenate(embeddings)

    def round_weights(self, *, on_progress: OnProgress) -> None:
        """Round the weights of all layers."""
        for number, (name, gram) in enumerate(self._grams.items()):
            on_progress("round", number, len(self._grams))
            for layer in self._units[name].layers:
                weight, scale = self._weight(layer), self._scales[layer]
                self._original[layer] = weight.clone()
                self._rounded[layer] = round_weight(weight, scale=scale, gram=gram)
                weight.copy_(dequantized(self._rounded[layer], scale, weight.dtype))
        on_progress("round", len(self._grams), len(self._grams))
        self._grams.clear()

    def quantize_all_but(self, kept: Sequence[str]) -> None:
        """Switch every unit."""
        for unit in self._units.values():
            self._switch(unit, on=unit.name not in kept)

    @contextmanager
    def quantized(self, unit: Unit) -> Iterator[None]:
        """Quantize one unit for the length of a block."""
        self._switch(unit, on=True)
        try:
            yield
        finally:
            self._switch(unit, on=False)

    def quantized_copy(self, tower: Tower, *, kept: Sequence[str]) -> Tower:
        """The tower itself with FP8 modules in the place of its quantized units."""
        made: dict[str, nn.Module] = {}
        for unit in self._units.values():
            if unit.name in kept:
                continue
            for point in unit.points:
                made[point] = QuantizedPoint(self._scales[point])
            for layer in unit.layers:
                original: Any = tower.get_submodule(layer)
                made[layer] = QuantizedLinear(
                    self._rounded[layer], scale=self._scales[layer], bias=original.bias
                )
        quantized = copy.deepcopy(tower)
        replace(quantized, made)
        return quantized

    def _switch(self, unit: Unit, *, on: bool) -> None:
        if on == (unit.name in self._quantized):
            return
        for name in (*unit.points, *unit.layers):
            quantizer = self._quantizer(name)
            quantizer.enable() if on else quantizer.disable()
        for layer in unit.layers:
            weight = self._weight(layer)
            scale = self._scales[layer]
            weight.copy_(
                dequantized(self._rounded[layer], scale, weight.dtype)
                if on
                else self._original[layer]
            )
        (self._quantized.add if on else self._quantized.discard)(unit.name)

    def _quantizer(self, name: str) -> TensorQuantizer:
        module: Any = self.tower.get_submodule(name)
        return module.input_quantizer if name.endswith("_point") else module.weight_quantizer

    def _quantizers(self) -> Iterator[tuple[str, TensorQuantizer]]:
        for unit in self._units.values():
            for name in (*unit.points, *unit.layers):
                yield name, self._quantizer(name)

    def _weight(self, layer: str) -> Tensor:
        module: Any = self.tower.get_submodule(layer)
        weight: Tensor = module.weight.data
        return weight


class _Correlation:
    """Sums x x^T of a point's inputs; hangs on it as a forward hook."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._num_tokens = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0]
        step = max(1, tokens.shape[1] // TOKENS_PER_ROW)
        tokens = tokens[:, ::step].reshape(-1, tokens.shape[-1]).float()
        if self._sum is None:
            self._sum = tokens.new_zeros(tokens.shape[1], tokens.shape[1])
        self._sum.addmm_(tokens.t(), tokens)
        self._num_tokens += len(tokens)

    def gram(self) -> Tensor:
        """float32 [width, width]."""
        assert self._sum is not None
        return self._sum / self._num_tokens


def _scale(name: str, quantizer: TensorQuantizer) -> float:
    assert quantizer.amax is not None, name  # units lie in blocks, and every point is passed
    amax = float(quantizer.amax)
    if amax == 0:
        raise QuantizationError(
            f"{name}: always zero in the sample, so no scale can be found; the checkpoint is "
            "damaged there, or the sample is not of its kind"
        )
    if name.endswith("probabilities_point"):
        return PROBABILITIES_SCALE
    return power_of_two_scale(amax)


def _first_rows(batches: Sequence[Tensor], num_rows: int) -> list[Tensor]:
    chosen: list[Tensor] = []
    for batch in batches:
        missing = num_rows - sum(map(len, chosen))
        if missing <= 0:
            break
        chosen.append(batch[:missing])
    return chosen


def _in_batches(batches: Sequence[Tensor], num_rows: int) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.split(num_rows)


def _embeddings(tower: nn.Module, batches: Sequence[Tensor]) -> Embeddings:
    with torch.inference_mode():
        return np.concatenate([tower(batch).cpu().numpy() for batch in batches])
