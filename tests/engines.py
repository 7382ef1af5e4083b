"""Engines and plans of a few bytes, which a registry cannot tell from real ones."""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from engine.manifest import Manifest, Precision
from engine.preprocess import Preprocessing

FP32_ID = "fp32-0011223344556677"
FP8_ID = "fp8-8899aabbccddeeff"
PLAN_ID = "tensorrt-10.13.3-sm_90-bulk256"
DIGEST = "ab" * 32


def write_engine(
    directory: Path,
    *,
    engine_id: str = FP32_ID,
    content: bytes = b"graph",
    checkpoint_digest: str = DIGEST,
) -> Manifest:
    """Write an engine of two files, one in a folder of its own."""
    files = {"image.onnx": content, "weights/image.onnx": content * 2}
    for name, part in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(part)
    manifest = Manifest(
        engine_id=engine_id,
        checkpoint="acme/clip",
        revision=None,
        checkpoint_digest=checkpoint_digest,
        precision=cast("Precision", engine_id.split("-")[0]),
        embedding_dim=4,
        preprocessing=Preprocessing(
            height=2,
            width=2,
            resize=(2, 2),
            crop=(2, 2),
            resample=3,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            rescale_factor=1 / 255,
        ),
        text=None,
        files={name: hashlib.sha256(part).hexdigest() for name, part in files.items()},
        versions={},
    )
    manifest.write(directory)
    return manifest


def write_plan(directory: Path, *, content: bytes = b"plan") -> None:
    """Write a plan of one file."""
    (directory / "image.plan").write_bytes(content)
    record: dict[str, Any] = {"files": {"image.plan": hashlib.sha256(content).hexdigest()}}
    (directory / "plan.json").write_text(json.dumps(record))


def flip_byte(path: Path) -> None:
    """Damage a file in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
