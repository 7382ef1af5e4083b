"""transformers' own models as known answers for towers, and what a tower must withstand.

Knows nothing of how families are built.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from engine.checkpoint import find_checkpoint
from engine.export import export_image_tower, export_text_tower
from engine.model import Model, load_model
from engine.towers import QuantizationPoint, Tower
from tests.checkpoints import MAX_TOKENS


def load(directory: Path) -> Model:
    return load_model(find_checkpoint(str(directory)))


def reference(directory: Path) -> Any:
    """The checkpoint as transformers loads it, float32."""
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()


def pixels_for(model: Model, *, num_rows: int = 4) -> Tensor:
    """Noise uint8 [rows, H, W, 3] in the size that the model takes."""
    preprocessing = model.preprocessing
    shape = (num_rows, preprocessing.height, preprocessing.width, 3)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


def normalized(pixels: Tensor, directory: Path) -> Tensor:
    config = json.loads((directory / "preprocessor_config.json").read_text())
    mean, std = torch.tensor(config["image_mean"]), torch.tensor(config["image_std"])
    return ((pixels.float() * config["rescale_factor"] - mean) / std).permute(0, 3, 1, 2)


def image_features(directory: Path, pixels: Tensor) -> Tensor:
    """transformers' image embeddings, not yet of unit norm."""
    model, values = reference(directory), normalized(pixels, directory)
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=values).pooler_output
    output = model(pixel_values=values)
    return output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output


def text_features(directory: Path, ids: Tensor, **inputs: Tensor) -> Tensor:
    """transformers' text embeddings, not yet of unit norm."""
    return reference(directory).get_text_features(input_ids=ids.long(), **inputs).pooler_output


def token_rows(*, first: int | None, end: int, pad: int, ids: range) -> tuple[Tensor, Tensor]:
    """Five rows int32 [5, 16] of unlike lengths, padded, and which ids are not padding."""
    lengths = torch.tensor([MAX_TOKENS, 2, 9, 5, 12])
    rows = torch.randint(
        ids.start,
        ids.stop,
        (len(lengths), MAX_TOKENS),
        generator=torch.Generator().manual_seed(4),
    )
    rows = rows.masked_fill(rows == end, ids.start)
    if first is not None:
        rows[:, 0] = first
    rows[torch.arange(len(lengths)), lengths - 1] = end
    is_text = torch.arange(MAX_TOKENS) < lengths[:, None]
    return rows.masked_fill(~is_text, pad).int(), is_text


@torch.inference_mode()
def assert_tower(tower: Tower, rows: Tensor, features: Tensor, *, folder: Path) -> None:
    """A tower against transformers' features: in float32, in float16 and as ONNX."""
    ours, theirs = tower(rows), functional.normalize(features)
    assert ours.dtype == torch.float32
    assert ours.shape == features.shape
    # Rows apart by far more than the tolerances, or equality would say little.
    assert torch.pdist(theirs).min() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert functional.cosine_similarity(ours.double(), theirs.double()).min() > 0.999999
    half = copy.deepcopy(tower).to_dtype(torch.float16)
    assert {tensor.dtype for tensor in half.backbone.parameters()} == {torch.float16}
    assert functional.cosine_similarity(half(rows), theirs).min() > 0.999
    for ready, atol in ((tower, 2e-6), (half, 5e-3)):
        np.testing.assert_allclose(
            under_onnx(ready, rows, folder=folder), ready(rows).numpy(), rtol=0, atol=atol
        )


def under_onnx(tower: Tower, rows: Tensor, *, folder: Path) -> np.ndarray:
    """What ONNX Runtime makes of the exported tower; all rows at once and one are the same."""
    path = folder / "tower.onnx"
    if rows.dtype == torch.uint8:
        export_image_tower(tower, height=rows.shape[1], width=rows.shape[2], path=path)
    else:
        export_text_tower(tower, path=path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    (together,) = session.run(None, {name: rows.numpy()})
    (alone,) = session.run(None, {name: rows[:1].numpy()})
    np.testing.assert_allclose(together[:1], alone, rtol=0, atol=2e-3)
    assert together.dtype == np.float32
    return together


def assert_points_lie_in_blocks(tower: Tower) -> None:
    """Quantization sees the blocks and nothing else."""
    names = [name for name, part in tower.named_modules() if isinstance(part, QuantizationPoint)]
    assert len(names) == 8 * len(tower.backbone.blocks)
    assert all(name.startswith("backbone.blocks.") for name in names)
