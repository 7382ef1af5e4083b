"""A tower as FP8 would leave it, simulated by NVIDIA ModelOpt: calibrated, and switched by units.

Knows nothing of which units should be quantized.
"""

import copy
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from engine.accuracy import Embeddings
from engine.errors import QuantizationError
from engine.progress import OnProgress
from engine.quantization.fp8 import (
    FP8_MAX,
    PROBABILITIES_SCALE,
    QuantizedLinear,
    QuantizedPoint,
    dequantized,
    power_of_two_scale,
)
from engine.quantization.half_precision import watched_activations
from engine.quantization.rounding import round_weight
from engine.quantization.units import Unit, replace
from engine.towers import QuantizationPoint, Tower

with warnings.catch_warnings():
    # It warns of any transformers that it was not tested with (none of its transformers code runs),
    # and torch warns of torch.jit, which it uses.
    warnings.simplefilter("ignore", UserWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantInputBase, QuantModuleRegistry, TensorQuantizer

# Tokens of each row that enter the correlations of inputs, evenly spaced: 512 rows give ten times
# as many as the widest layer of a ViT-B has inputs.
TOKENS_PER_ROW = 64
E4M3 = {"num_bits": (4, 3), "axis": None}
MODELOPT_CONFIG = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*.blocks.*weight_quantizer", "cfg": E4M3, "enable": True},
        {"quantizer_name": "*_point.input_quantizer", "cfg": E4M3, "enable": True},
    ],
    "algorithm": None,  # calibrated apart
}

TowerT = TypeVar("TowerT", bound=Tower)


class Simulation:
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
                    embeddings.append(embed(converted, [batch]))
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

    def quantized_copy(self, tower: TowerT, *, kept: Sequence[str]) -> TowerT:
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


def embed(tower: nn.Module, batches: Sequence[Tensor]) -> Embeddings:
    """Embeddings float32 [N, D] of all rows of some batches."""
    with torch.inference_mode():
        return np.concatenate([tower(batch).cpu().numpy() for batch in batches])
