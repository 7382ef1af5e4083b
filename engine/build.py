"""What the engine of a checkpoint is called, and how one is built from the checkpoint alone.

Knows nothing of where engines are kept.
"""

import hashlib
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from engine.checkpoint import Checkpoint
from engine.manifest import (
    IMAGE_ONNX,
    RECIPE_VERSION,
    TEXT_ONNX,
    TOKENIZER_FILE,
    Manifest,
    Precision,
    file_digest,
)
from engine.registry import Engine, Registry

# Precisions that need nothing but the checkpoint, so that any node can build such an engine.
UnquantizedPrecision = Literal["fp32", "fp16"]
_UNQUANTIZED: tuple[UnquantizedPrecision, ...] = ("fp32", "fp16")


def engine_id_of(checkpoint: Checkpoint, *, precision: Precision = "fp32", recipe: str = "") -> str:
    """The id that an engine of this checkpoint has, whether it is built or not.

    Same id, same embeddings: it hashes all that makes them.

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
    """
    # torch and transformers are needed to build an engine, not to find or run one.
    import torch

    from engine.export import export_image_tower, export_text_tower, export_tokenizer
    from engine.model import load_model

    dtype = torch.float16 if precision == "fp16" else torch.float32
    model = load_model(checkpoint)
    export_image_tower(
        model.image_tower.to_dtype(dtype),
        height=model.preprocessing.height,
        width=model.preprocessing.width,
        path=directory / IMAGE_ONNX,
    )
    text = None
    if model.text_tower is not None and model.token_rules is not None:
        export_text_tower(model.text_tower.to_dtype(dtype), path=directory / TEXT_ONNX)
        text = export_tokenizer(
            checkpoint, rules=model.token_rules, path=directory / TOKENIZER_FILE
        )
    manifest = Manifest(
        engine_id=engine_id_of(checkpoint, precision=precision),
        checkpoint=checkpoint.name,
        revision=checkpoint.revision,
        checkpoint_digest=checkpoint.digest,
        precision=precision,
        embedding_dim=model.embedding_dim,
        preprocessing=model.preprocessing,
        text=text,
        files={path.name: file_digest(path) for path in sorted(directory.iterdir())},
        versions={name: version(name) for name in ("clipmill", "torch", "transformers", "onnx")},
    )
    manifest.write(directory)
    return manifest
