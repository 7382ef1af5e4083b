"""Small engines whose towers are FP8, made without any calibration library.

Knows nothing of how Clipmill finds scales: here each is the largest value of random inputs.
"""

import dataclasses
import shutil
from pathlib import Path

import onnx
import torch

from engine.checkpoint import find_checkpoint
from engine.export import export_image_tower, export_text_tower
from engine.manifest import IMAGE_ONNX, TEXT_ONNX, file_digest, read_manifest
from engine.model import load_model
from engine.quantization.units import replace
from tests.max_calibration import quantize

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
        kept = {in_16_bit: tower.get_submodule(in_16_bit)} if in_16_bit else {}
        quantize(tower, example)
        replace(tower, kept)
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
