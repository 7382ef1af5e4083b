"""Towers on disk: a safetensors file each, FP8 or 16 bit, loadable without ModelOpt.

Knows nothing of how a tower was quantized or of what executes it.

Beside `image.safetensors` and `text.safetensors` lies the checkpoint's `config.json`, which has
their sizes. Tensors have the names of the tower's own modules:

    backbone.blocks.0.attention.query.weight          float8_e4m3fn [out, in]
    backbone.blocks.0.attention.query.weight_scale    float32 [], a power of two
    backbone.blocks.0.attention.query.bias            float16 [out]
    backbone.blocks.0.attention.input_point.scale     float32 []; x enters as FP8(x / scale)

A layer without `weight_scale`, and a point without `scale`, is in 16 bit. So is all the rest.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.errors import CheckpointError, EngineError
from engine.model import Model, build_model, read_config
from engine.preprocess import Preprocessing
from engine.quantization.fp8 import FP8, QuantizedLinear, QuantizedPoint
from engine.quantization.units import replace, units_of
from engine.towers import Tower

IMAGE_WEIGHTS, TEXT_WEIGHTS = "image.safetensors", "text.safetensors"
WEIGHT_SCALE, POINT_SCALE = "weight_scale", "scale"
DTYPE = torch.float16
MAX_DETAIL_CHARS = 300


def save_towers(model: Model, directory: Path) -> None:
    """Write the tensors of a model's towers: FP8 where they have FP8 modules, else float16."""
    save_tower(model.image_tower, directory / IMAGE_WEIGHTS)
    if model.text_tower is not None:
        save_tower(model.text_tower, directory / TEXT_WEIGHTS)


def load_towers(directory: Path, *, preprocessing: Preprocessing) -> Model:
    """Read what `save_towers` wrote, beside a `config.json`, as float16 towers on the CPU.

    Raises:
        EngineError: A file is missing, damaged, or does not fit the others.
    """
    try:
        config = read_config(directory)
        with _Uninitialized():
            model = build_model(config, preprocessing=preprocessing)
    except (CheckpointError, OSError) as error:
        raise EngineError(
            f"{directory}: {error}; remove the folder and build the engine again"
        ) from error
    model.settle()
    load_tower(model.image_tower, directory / IMAGE_WEIGHTS)
    if model.text_tower is not None:
        load_tower(model.text_tower, directory / TEXT_WEIGHTS)
    return model


class _Uninitialized(TorchFunctionMode):
    """Within it modules begin with whatever is in memory.

    Random weights, which saved ones replace, take 1.3 of the 1.6 s that one core needs to load
    ViT-B/32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def save_tower(tower: Tower, path: Path) -> None:
    """Write a tower's tensors: FP8 where it has FP8 modules, float16 elsewhere."""
    tensors = {name: tensor.to(DTYPE) for name, tensor in tower.state_dict().items()}
    for name, module in tower.named_modules():
        if isinstance(module, QuantizedLinear):
            tensors[f"{name}.weight"] = module.weight.t()
            tensors[f"{name}.{WEIGHT_SCALE}"] = torch.tensor(module.scale)
        elif isinstance(module, QuantizedPoint):
            tensors[f"{name}.{POINT_SCALE}"] = torch.tensor(module.scale)
    # Not `save_file`, whose files nobody else may read.
    path.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))


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
    except (KeyError, RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())[:MAX_DETAIL_CHARS]
        raise EngineError(
            f"{path}: does not fit the engine's config.json ({detail}); remove the engine's folder "
            "and build it again"
        ) from error
    return tower.eval()


def _quantized_modules(tower: nn.Module, tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
    """FP8 modules for the tensors that need them; takes out of `tensors` what is then in place."""
    made: dict[str, nn.Module] = {}
    units = units_of(tower)
    for name in [layer for unit in units for layer in unit.layers]:
        scale, weight = tensors.pop(f"{name}.{WEIGHT_SCALE}", None), tensors[f"{name}.weight"]
        original: Any = tower.get_submodule(name)
        if weight.shape != original.weight.shape:
            raise ValueError(
                f"{name}.weight is {list(weight.shape)}, not {list(original.weight.shape)}"
            )
        if (scale is None) != (weight.dtype != FP8):
            raise ValueError(f"{name}: FP8 without a scale, or a scale without FP8")
        if scale is not None:
            bias = None if original.bias is None else tensors[f"{name}.bias"]
            made[name] = QuantizedLinear(weight, scale=float(scale), bias=bias)
            tensors[f"{name}.weight"] = weight.t()
    for name in [point for unit in units for point in unit.points]:
        scale = tensors.pop(f"{name}.{POINT_SCALE}", None)
        if scale is not None:
            made[name] = QuantizedPoint(float(scale))
    for unit in units:
        parts = {*unit.points, *unit.layers}
        if not parts <= made.keys() and not parts.isdisjoint(made):
            raise ValueError(f"{unit.name}: some of its points and layers are FP8, others not")
    return made
