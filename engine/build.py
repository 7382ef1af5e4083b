"""What the engine of a checkpoint is called, and how one is built from the checkpoint alone.

Knows nothing of where engines are kept.
"""

import hashlib
import shutil
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.checkpoint import CONFIG_FILE, Checkpoint
from engine.manifest import (
    IMAGE_ONNX,
    RECIPE_VERSION,
    TEXT_ONNX,
    TOKENIZER_FILE,
    Manifest,
    Precision,
    Quantization,
    TextInput,
    file_digest,
)
from engine.registry import Engine, Registry

if TYPE_CHECKING:
    from engine.model import Model

# Precisions that need nothing but the checkpoint, so that any node can build such an engine.
UnquantizedPrecision = Literal["fp32", "fp16"]
_UNQUANTIZED: tuple[UnquantizedPrecision, ...] = ("fp32", "fp16")


def engine_id_of(checkpoint: Checkpoint, *, precision: Precision = "fp32", recipe: str = "") -> str:
    """The id that an engine of this checkpoint has, whether it is built or not.

    Same id, same embeddings: it hashes all that makes them. For an fp8 engine that is true of one
    build; see `Manifest.weights`.

    Args:
        checkpoint: Of whose files the digest counts.
        precision: Of the engine; the id begins with it.
        recipe: What else the embeddings depend on: for fp8, how and on which sample it was
            calibrated.
    """
    parts = [checkpoint.digest, precision, f"recipe-{RECIPE_VERSION}", recipe]
    digest = hashlib.sha256(" ".join(filter(None, parts)).encode()).hexdigest()
    return f"{precision}-{digest[:16]}"


def unquantized_precision(engine_id: str) -> UnquantizedPrecision | None:
    """The precision that an id begins with; None if such an engine takes more than a checkpoint."""
    return next((name for name in _UNQUANTIZED if engine_id.startswith(f"{name}-")), None)


def load_or_build(
    checkpoint: Checkpoint, *, registry: Registry, precision: UnquantizedPrecision = "fp32"
) -> Engine:
    """Find the unquantized engine of a checkpoint, or build it; a damaged one is built anew.

    Raises:
        CheckpointError: The checkpoint cannot be built from.
        QuantizationError: It holds weights that 16 bit cannot hold.
        EngineError: The registry cannot be read or written.
    """
    build = partial(build_unquantized, checkpoint, precision=precision)
    return registry.obtain(engine_id_of(checkpoint, precision=precision), build)


def build_unquantized(
    checkpoint: Checkpoint, directory: Path, *, precision: UnquantizedPrecision = "fp32"
) -> Manifest:
    """Write an engine of this precision into an empty folder, its manifest last.

    Raises:
        CheckpointError: The checkpoint cannot be built from.
        QuantizationError: It holds weights that 16 bit cannot hold.
    """
    # torch and transformers are needed to build an engine, not to find or run one.
    from engine.model import load_model

    model = load_model(checkpoint)
    text = write_tokenizer(checkpoint, model, directory)
    write_towers(checkpoint, model, directory, precision=precision)
    return write_manifest(
        checkpoint,
        model,
        directory,
        engine_id=engine_id_of(checkpoint, precision=precision),
        precision=precision,
        text=text,
        quantization=None,
    )


def write_tokenizer(checkpoint: Checkpoint, model: "Model", directory: Path) -> TextInput | None:
    """Write `tokenizer.json` for a model with a text tower; CheckpointError if they do not fit."""
    from engine.export import export_tokenizer

    if model.token_rules is None:
        return None
    return export_tokenizer(checkpoint, rules=model.token_rules, path=directory / TOKENIZER_FILE)


def write_towers(
    checkpoint: Checkpoint, model: "Model", directory: Path, *, precision: Precision
) -> None:
    """Write the towers, and their graphs as ONNX; below fp32 both are in 16 bit but for FP8.

    Raises:
        QuantizationError: Weights that 16 bit cannot hold.
    """
    from engine.export import export_image_tower, export_text_tower
    from engine.quantization.half_precision import check_weights
    from engine.stored_towers import load_towers, save_towers

    if precision != "fp32":
        for tower in filter(None, (model.image_tower, model.text_tower)):
            check_weights(tower)
        shutil.copyfile(checkpoint.directory / CONFIG_FILE, directory / CONFIG_FILE)
        save_towers(model, directory)
        # The graphs are made of what is stored, so that whoever runs either runs the same.
        model = load_towers(directory, preprocessing=model.preprocessing)
    preprocessing = model.preprocessing
    export_image_tower(
        model.image_tower,
        height=preprocessing.height,
        width=preprocessing.width,
        path=directory / IMAGE_ONNX,
    )
    if model.text_tower is not None:
        export_text_tower(model.text_tower, path=directory / TEXT_ONNX)


def write_manifest(
    checkpoint: Checkpoint,
    model: "Model",
    directory: Path,
    *,
    engine_id: str,
    precision: Precision,
    text: TextInput | None,
    quantization: Quantization | None,
) -> Manifest:
    """Write `manifest.json` over all files that are in the folder."""
    libraries = ["clipmill", "torch", "transformers", "onnx"]
    libraries += [] if quantization is None else ["nvidia-modelopt"]
    manifest = Manifest(
        engine_id=engine_id,
        checkpoint=checkpoint.location,
        revision=checkpoint.revision,
        checkpoint_digest=checkpoint.digest,
        precision=precision,
        embedding_dim=model.embedding_dim,
        preprocessing=model.preprocessing,
        text=text,
        quantization=quantization,
        files={path.name: file_digest(path) for path in sorted(directory.iterdir())},
        versions={name: _version(name) for name in libraries},
    )
    manifest.write(directory)
    return manifest


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"  # Clipmill itself, run from Ray's working_dir
