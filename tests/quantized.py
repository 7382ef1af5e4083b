"""The demo checkpoint's towers, rows of what they take, and both towers quantized, for tests."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from engine.accuracy import Thresholds
from engine.checkpoint import find_checkpoint
from engine.export import export_image_tower, export_text_tower, export_tokenizer
from engine.images import ImageLimits
from engine.manifest import (
    IMAGE_ONNX,
    TEXT_ONNX,
    TOKENIZER_FILE,
    Manifest,
    Precision,
    file_digest,
)
from engine.model import Model, load_model
from engine.preprocess import decode_pixels
from engine.progress import OnProgress
from engine.quantization.quantize import MIN_ROWS, QuantizedTower, quantize_tower
from engine.towers import ImageTower, TextTower, Tower
from jobs.demo.catalog import sample_rows
from jobs.demo.run import CHECKPOINT_DIR

NUM_HELD_OUT = 128
# The demo's scenes lie close together, so that neighbours change places early.
DEMO_THRESHOLDS = Thresholds(min_neighbour_overlap=0.9)
BATCH_ROWS = 64

MODALITIES = ("image", "text")
# Of the demo's graphs: which products are quantized, and which are not.
NUM_BLOCKS = {"image": 4, "text": 2}
BLOCK_PRODUCTS = (
    "attention/MatMul",
    "attention/MatMul_1",
    "attention/key/MatMul",
    "attention/output/MatMul",
    "attention/query/MatMul",
    "attention/value/MatMul",
    "feed_forward/fc1/MatMul",
    "feed_forward/fc2/MatMul",
)
IN_16_BIT = {
    "image": ("/backbone/patch_embedding/Conv", "/projection/MatMul"),
    "text": ("/projection/MatMul",),
}


@dataclass(frozen=True, kw_only=True)
class DemoTower:
    """One tower and its rows."""

    original: Tower
    sample: Tensor
    """MIN_ROWS rows to calibrate with."""
    held_out: Tensor
    """Other rows."""

    def quantize(
        self,
        tower: Tower | None = None,
        *,
        thresholds: Thresholds | None = None,
        on_progress: OnProgress = lambda stage, done, total: None,
    ) -> QuantizedTower[Tower]:
        """Quantize the original, or a copy with other weights."""
        return quantize_tower(
            self.original if tower is None else tower,
            self.sample.split(BATCH_ROWS),
            thresholds=thresholds or DEMO_THRESHOLDS,
            on_progress=on_progress,
        )


@dataclass(frozen=True, kw_only=True)
class QuantizedDemo:
    """The demo checkpoint, quantized."""

    model: Model
    pixels: NDArray[np.uint8]
    """Of the held-out rows."""
    texts: tuple[str, ...]
    """Of the same."""
    towers: Mapping[str, DemoTower]
    """By modality."""
    quantized: Mapping[str, QuantizedTower[Tower]]
    """By modality, at DEMO_THRESHOLDS."""


def quantize_demo() -> QuantizedDemo:
    """Quantize both towers."""
    model = load_model(find_checkpoint(str(CHECKPOINT_DIR)))
    assert model.text_tower is not None
    rows = sample_rows(MIN_ROWS + NUM_HELD_OUT)
    pixels = np.stack(
        [
            decode_pixels(row.image, preprocessing=model.preprocessing, limits=ImageLimits())
            for row in rows
        ]
    )
    texts = tuple(row.text for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT_DIR))
    token_ids = tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"].int()
    towers = {
        name: DemoTower(original=tower, sample=inputs[:MIN_ROWS], held_out=inputs[MIN_ROWS:])
        for name, tower, inputs in (
            ("image", model.image_tower, torch.from_numpy(pixels)),
            ("text", model.text_tower, token_ids),
        )
    }
    return QuantizedDemo(
        model=model,
        pixels=pixels[MIN_ROWS:],
        texts=texts[MIN_ROWS:],
        towers=towers,
        quantized={name: tower.quantize() for name, tower in towers.items()},
    )


def write_demo_engine(
    directory: Path, model: Model, *, image: Tower, text: Tower, precision: Precision
) -> Manifest:
    """Write an engine of the demo checkpoint with these towers."""
    assert model.token_rules is not None
    export(image, directory / IMAGE_ONNX)
    export(text, directory / TEXT_ONNX)
    checkpoint = find_checkpoint(str(CHECKPOINT_DIR))
    text_input = export_tokenizer(
        checkpoint, rules=model.token_rules, path=directory / TOKENIZER_FILE
    )
    manifest = Manifest(
        engine_id=f"{precision}-0123456789abcdef",
        checkpoint="acme/demo",
        revision=None,
        checkpoint_digest=checkpoint.digest,
        precision=precision,
        embedding_dim=model.embedding_dim,
        preprocessing=model.preprocessing,
        text=text_input,
        files={path.name: file_digest(path) for path in directory.iterdir()},
        versions={},
    )
    manifest.write(directory)
    return manifest


@torch.inference_mode()
def embed(tower: torch.nn.Module, inputs: Tensor) -> NDArray[np.float32]:
    """Embeddings of a tower's inputs."""
    return np.concatenate([tower(batch).numpy() for batch in inputs.split(BATCH_ROWS)])


def export(tower: Tower, path: Path) -> Path:
    """Write a demo tower as ONNX."""
    if isinstance(tower, ImageTower):
        export_image_tower(tower, height=64, width=64, path=path)
    else:
        assert isinstance(tower, TextTower)
        export_text_tower(tower, path=path)
    return path


def run_onnx(path: Path, inputs: Tensor) -> NDArray[np.float32]:
    """Embeddings by ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate(
        [session.run(None, {name: batch.numpy()})[0] for batch in inputs.split(BATCH_ROWS)]
    )


def in_16_bit(tower: Tower) -> Tower:
    """A float16 copy."""
    return copy.deepcopy(tower).to_dtype(torch.float16)


@torch.no_grad()
def with_gains(tower: Tower, *, block: int, channels: Sequence[int], gain: float) -> Tower:
    """A copy whose LayerNorms of one block put out some channels `gain` times as large.

    What reads them takes it back, so that its embeddings are the same in float32, exactly so for
    a power of two.
    """
    changed = copy.deepcopy(tower)
    part = changed.get_submodule(f"backbone.blocks.{block}")
    attention = part.attention
    for norm, layers in (
        (part.norm1, (attention.query, attention.key, attention.value)),
        (part.norm2, (part.feed_forward.fc1,)),
    ):
        for parameter in (norm.weight, norm.bias):
            parameter[list(channels)] *= gain
        for layer in layers:
            layer.weight[:, list(channels)] /= gain
    return changed
