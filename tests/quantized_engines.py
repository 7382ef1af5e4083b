"""Small engines whose towers are FP8, made without any calibration library.

Knows nothing of how Clipmill finds scales: here each is the largest value of random inputs.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from engine import fp8
from engine.checkpoint import find_checkpoint
from engine.export import export_image_tower, export_text_tower
from engine.manifest import IMAGE_ONNX, TEXT_ONNX, file_digest, read_manifest
from engine.model import load_model

ENGINE_ID = "fp8-0123456789abcdef"


def save_quantized_engine(
    directory: Path, *, unquantized: Path, checkpoint_dir: Path, in_16_bit: str = ""
) -> Path:
    """Copy an engine, with FP8 towers of its checkpoint in place of its own.

    Args:
        directory: The new engine's folder.
        unquantized: Folder of the checkpoint's fp32 engine.
        checkpoint_dir: The checkpoint.
        in_16_bit: Name of one layer that stays in 16 bit.
    """
    shutil.copytree(unquantized, directory)
    model = load_model(find_checkpoint(str(checkpoint_dir)))
    size = (model.preprocessing.height, model.preprocessing.width)
    assert model.text_tower is not None
    pixels = torch.randint(0, 256, (4, *size, 3), dtype=torch.uint8)
    token_ids = torch.randint(0, 600, (4, 16), dtype=torch.int32)
    for tower, example in ((model.image_tower, pixels), (model.text_tower, token_ids)):
        quantize(tower, example, in_16_bit=in_16_bit)
        tower.to_dtype(torch.float16)
    height, width = size
    export_image_tower(model.image_tower, height=height, width=width, path=directory / IMAGE_ONNX)
    export_text_tower(model.text_tower, path=directory / TEXT_ONNX)
    manifest = read_manifest(directory)
    dataclasses.replace(
        manifest,
        engine_id=ENGINE_ID,
        precision="fp8",
        files={name: file_digest(directory / name) for name in manifest.files},
    ).write(directory)
    return directory


@torch.no_grad()
def quantize(tower: nn.Module, example: Tensor, *, in_16_bit: str) -> None:
    amaxes: dict[str, float] = {}
    hooks = [point.register_forward_hook(_keep(amaxes, name)) for name, point in fp8.points(tower)]
    tower(example)
    for hook in hooks:
        hook.remove()
    for name, _ in list(fp8.points(tower)):
        is_softmax = name.endswith("probabilities_point")
        scale = fp8.PROBABILITIES_SCALE if is_softmax else fp8.power_of_two_scale(amaxes[name])
        fp8.replace(tower, name, fp8.QuantizedPoint(scale))
    for name, layer in list(fp8.layers(tower)):
        if name != in_16_bit:
            scale = fp8.power_of_two_scale(float(layer.weight.abs().max()))
            weight = fp8.quantized(layer.weight, scale)
            made = fp8.QuantizedLinear(weight, scale=scale, bias=layer.bias)
            fp8.replace(tower, name, made)


def _keep(amaxes: dict[str, float], name: str) -> Callable[[nn.Module, object, Tensor], None]:
    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        amaxes[name] = float(output.abs().max())

    return keep


def fp8_products(path: Path) -> frozenset[str]:
    """MatMul nodes of a graph whose both inputs are dequantized."""
    graph = onnx.load(path).graph
    producer = {output: node.op_type for node in graph.node for output in node.output}
    return frozenset(
        node.name
        for node in graph.node
        if node.op_type == "MatMul"
        and all(producer.get(name) == "DequantizeLinear" for name in node.input)
    )
