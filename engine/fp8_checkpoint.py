"""A quantized tower on disk: one safetensors file, loadable without ModelOpt.

Knows nothing of how a tower was quantized or of what executes it.

Tensors have the names of the tower's own modules:

    backbone.blocks.0.attention.query.weight          float8_e4m3fn [out, in]
    backbone.blocks.0.attention.query.weight_scale    float32 [], a power of two
    backbone.blocks.0.attention.query.bias            float16 [out]
    backbone.blocks.0.attention.input_point.scale     float32 []; x enters as FP8(x / scale)

A layer without `weight_scale`, and a point without `scale`, is in 16 bit. So is all the rest.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import EngineError
from engine.fp8 import FP8, QuantizedLinear, QuantizedPoint
from engine.towers import Tower
from engine.units import replace

WEIGHT_SCALE, POINT_SCALE = "weight_scale", "scale"
DTYPE = torch.float16


def save_tower(tower: Tower, path: Path) -> None:
    """Write a tower's tensors: FP8 where it has FP8 modules, float16 elsewhere."""
    tensors = {name: tensor.to(DTYPE) for name, tensor in tower.state_dict().items()}
    for name, module in tower.named_modules():
        if isinstance(module, QuantizedLinear):
            tensors[f"{name}.weight"] = module.weight.t()
            tensors[f"{name}.{WEIGHT_SCALE}"] = torch.tensor(module.scale)
        elif isinstance(module, QuantizedPoint):
            tensors[f"{name}.{POINT_SCALE}"] = torch.tensor(module.scale)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tower(tower: Tower, path: Path) -> Tower:
    """Fill a tower of the right sizes with saved tensors; it becomes a float16 one.

    Raises:
        EngineError: The file is missing, damaged, or another tower's.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise EngineError(
            f"{path}: cannot be read ({error}); remove the engine's folder and build it again"
        ) from error
    try:
        replace(tower, _quantized_modules(tower, tensors))
        tower.to_dtype(DTYPE)
        tower.load_state_dict(tensors)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise EngineError(
            f"{path}: does not fit the engine's config.json ({str(error).splitlines()[0]}); remove "
            "the engine's folder and build it again"
        ) from error
    return tower.eval()


def _quantized_modules(tower: nn.Module, tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
    """FP8 modules for the tensors that need them; takes out of `tensors` what is then in place."""
    made: dict[str, nn.Module] = {}
    for name in list(tensors):
        module, _, kind = name.rpartition(".")
        if kind == WEIGHT_SCALE:
            weight = tensors[f"{module}.weight"]
            if weight.dtype != FP8:
                raise KeyError(f"{module}.weight is {weight.dtype}, not FP8")
            made[module] = QuantizedLinear(
                weight, scale=float(tensors.pop(name)), bias=tensors.get(f"{module}.bias")
            )
            tensors[f"{module}.weight"] = weight.t()
        elif kind == POINT_SCALE:
            made[module] = QuantizedPoint(float(tensors.pop(name)))
    return made
