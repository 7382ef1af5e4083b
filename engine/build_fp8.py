"""Builds fp8 engines: a checkpoint and a sample -> FP8 weights, audited graphs, an account of both.

Knows nothing of where the sample comes from or of where engines are kept.
"""

import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.accuracy import Thresholds
from engine.build import engine_id_of, write_manifest, write_tokenizer, write_towers
from engine.checkpoint import Checkpoint
from engine.errors import QuantizationError
from engine.manifest import (
    AUDIT_FILE,
    FP8_RECIPE,
    IMAGE_ONNX,
    TEXT_ONNX,
    TOKENIZER_FILE,
    Manifest,
    Quantization,
    TextInput,
)
from engine.model import Model
from engine.progress import OnProgress
from engine.quantization.audit import Audit, audit_graph, check
from engine.quantization.quantize import QuantizedTower, quantize_tower
from engine.quantization.simulation import TowerT
from engine.sample import Sample
from engine.tokenization import Tokenizer

QUANTIZATION_FILE, README_FILE = "quantization.json", "README.md"
ROWS_PER_BATCH = 16
ONNX_FILES = {"image": IMAGE_ONNX, "text": TEXT_ONNX}
# Thresholds by which units are chosen; the gate alone asks for the others, of the same engine.
CHOOSING = ("min_cosine_p1", "min_cosine_min", "min_neighbour_overlap")

README = """# {engine_id}

`{checkpoint}` in FP8 (E4M3), quantized by Clipmill with NVIDIA ModelOpt {modelopt}.

| file | holds |
|---|---|
| `image.safetensors`, `text.safetensors` | weights: FP8, a scale beside each; the rest float16 |
| `image.onnx`, `text.onnx` | the same as graphs, with QuantizeLinear and DequantizeLinear |
| `config.json`, `tokenizer.json` | the checkpoint's own; texts are cut at the model's length |
| `quantization.json` | recipe, sample, cost of each unit, what was kept in 16 bit |
| `audit.json` | which products of the graphs are FP8 |
| `manifest.json` | checksums, preprocessing, versions |

A weight stands for its FP8 numbers times `<layer>.weight_scale`. An input x of a layer is rounded
to FP8(x / `<point>.scale`), where the point is the layer's: `input_point` for query, key and value,
else `<layer>_point`. Without a scale, layer and input are float16. To read them:

    from safetensors.torch import load_file
    tensors = load_file("image.safetensors")
    layer = "backbone.blocks.0.feed_forward.fc1"
    weight = tensors[layer + ".weight"].float() * tensors[layer + ".weight_scale"]

Kept in 16 bit: {kept}.
"""


def fp8_engine_id(checkpoint: Checkpoint, *, sample: Sample, thresholds: Thresholds) -> str:
    """The id of the engine that `build_fp8` makes of these."""
    recipe = f"{FP8_RECIPE} {_choosing(thresholds)} {sample.digest}"
    return engine_id_of(checkpoint, precision="fp8", recipe=recipe)


def build_fp8(
    checkpoint: Checkpoint,
    model: Model,
    directory: Path,
    *,
    sample: Sample,
    thresholds: Thresholds,
    device: str,
    on_progress: OnProgress,
) -> Manifest:
    """Quantize, export, audit and write an engine into an empty folder, its manifest last.

    Args:
        checkpoint: What the model was loaded from.
        model: Its towers in float32; left as they are.
        directory: Where to.
        sample: To calibrate with: images, and texts if there is a text tower.
        thresholds: How close to the model the engine must be, on the sample itself.
        device: `cpu` or `cuda`: where the towers run meanwhile.
        on_progress: Called with a stage's name, and how many of how many steps are done.

    Raises:
        CheckpointError: The tokenizer does not fit.
        QuantizationError: The sample or a layer does not allow FP8.
    """
    text = write_tokenizer(checkpoint, model, directory)
    batches = _batches(sample, text=text, directory=directory)
    for name in ("image",) if model.text_tower is None else ("image", "text"):
        if name not in batches:
            raise QuantizationError(f"the sample has no {name}s to calibrate the {name} tower with")

    def quantized(name: str, tower: TowerT) -> QuantizedTower[TowerT]:
        made = quantize_tower(
            tower.to(device),
            [batch.to(device) for batch in batches[name]],
            thresholds=thresholds,
            on_progress=lambda stage, *counts: on_progress(f"{name}: {stage}", *counts),
        )
        tower.to("cpu")
        made.tower.to("cpu")
        return dataclasses.replace(made, fake_quantized=None)

    image = quantized("image", model.image_tower)
    made: dict[str, QuantizedTower[Any]] = {"image": image}
    quantized_model = dataclasses.replace(model, image_tower=image.tower)
    if model.text_tower is not None:
        made["text"] = quantized("text", model.text_tower)
        quantized_model = dataclasses.replace(quantized_model, text_tower=made["text"].tower)
    on_progress("export", 0, 1)
    write_towers(checkpoint, quantized_model, directory, precision="fp8")
    audits = {name: _audited(directory / ONNX_FILES[name], tower) for name, tower in made.items()}
    on_progress("export", 1, 1)
    engine_id = fp8_engine_id(checkpoint, sample=sample, thresholds=thresholds)
    quantization = Quantization(
        calibration_uri=sample.uri,
        calibration_digest=sample.digest,
        num_calibration_rows=sample.num_rows,
        kept_in_16_bit=tuple(
            f"{name}.{unit}" for name, tower in made.items() for unit in tower.kept
        ),
    )
    _write_json(directory / AUDIT_FILE, audits)
    _write_json(directory / QUANTIZATION_FILE, _account(made, thresholds, quantization))
    readme = README.format(
        engine_id=engine_id,
        checkpoint=checkpoint.location,
        modelopt=version("nvidia-modelopt"),
        kept=quantization.kept_in_words() or "no unit",
    )
    (directory / README_FILE).write_text(readme)
    return write_manifest(
        checkpoint,
        model,
        directory,
        engine_id=engine_id,
        precision="fp8",
        text=text,
        quantization=quantization,
    )


def _choosing(thresholds: Thresholds) -> dict[str, float]:
    return {name: getattr(thresholds, name) for name in CHOOSING}


def _batches(
    sample: Sample, *, text: TextInput | None, directory: Path
) -> dict[str, list[torch.Tensor]]:
    batches: dict[str, list[torch.Tensor]] = {}
    if sample.pixels is not None:
        batches["image"] = list(torch.tensor(sample.pixels).split(ROWS_PER_BATCH))
    if text is not None and sample.texts is not None:
        tokenizer = Tokenizer(directory / TOKENIZER_FILE, text=text)
        made = tokenizer.batches(sample.texts, max_rows=ROWS_PER_BATCH, length_step=1)
        token_ids = [torch.from_numpy(rows) for _, rows in made]
        # They come by length; the first ones should be like all.
        order = np.random.default_rng(0).permutation(len(token_ids))
        batches["text"] = [token_ids[number] for number in order]
    return batches


def _audited(path: Path, made: QuantizedTower[Any]) -> Audit:
    audit = audit_graph(path, units=made.quantized)
    check(audit, path=path)
    return audit


def _account(
    made: Mapping[str, QuantizedTower[Any]], thresholds: Thresholds, quantization: Quantization
) -> dict[str, Any]:
    return {
        "recipe": FP8_RECIPE,
        "sample": dataclasses.asdict(quantization),
        "thresholds": _choosing(thresholds),
        "towers": {
            name: {
                "agreement": dataclasses.asdict(tower.agreement),
                "kept_in_16_bit": tower.kept,
                "costs": [dataclasses.asdict(cost) for cost in tower.costs],
            }
            for name, tower in made.items()
        },
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, default=dataclasses.asdict) + "\n")
