"""What an engine is: the JSON that names its parts, their checksums and how to feed them.

Knows nothing of how an engine is built or executed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import DamagedError, EngineError
from engine.preprocess import Preprocessing

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 2
# Part of every engine_id. Raised whenever the same checkpoint would give other embeddings than
# before, by more than rounding: by decoding, resizing, tokenizing or the exported graph.
RECIPE_VERSION = 1
# Part of every fp8 engine's id. Raised whenever the same sample would give other FP8 weights.
FP8_RECIPE = "modelopt-max-gptq-2"
IMAGE_ONNX, TEXT_ONNX, TOKENIZER_FILE = "image.onnx", "text.onnx", "tokenizer.json"
# Of fp8 engines: which products of the graphs are FP8.
AUDIT_FILE = "audit.json"

# fp32: the reference. fp16: 16 bit throughout. fp8: the products of the blocks in FP8, the rest
# in 16 bit.
Precision = Literal["fp32", "fp16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """How texts become token ids."""

    max_tokens: int
    """A text is cut after so many tokens, special tokens included."""
    pad_token_id: int
    """Fills short rows of a batch."""
    pads_to_max: bool = False
    """Whether every row is filled to `max_tokens`, because the model was trained so (SigLIP)."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How an fp8 engine became one; the details lie in its `quantization.json`."""

    calibration_uri: str
    """Catalog that the sample was drawn from."""
    calibration_digest: str
    """SHA-256 of the sample's pixels and texts."""
    num_calibration_rows: int
    """Rows of the sample, for each tower."""
    kept_in_16_bit: tuple[str, ...]
    """Units that FP8 would have cost too much: `image.backbone.blocks.3.attention.qkv`."""

    def kept_in_words(self) -> str:
        """For people: `image 3.qkv, 11.fc2; text 0.products`."""
        by_tower: dict[str, list[str]] = {}
        for unit in self.kept_in_16_bit:
            tower, *_, block, _, kind = unit.split(".")
            by_tower.setdefault(tower, []).append(f"{block}.{kind}")
        return "; ".join(f"{tower} {', '.join(units)}" for tower, units in by_tower.items())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One engine, complete: whoever holds the folder needs no checkpoint."""

    engine_id: str
    """Precision and the hash of everything that makes the output."""
    checkpoint: str
    """Hub id or folder that it was built from, as given."""
    revision: str | None
    """Hub commit, None for a folder."""
    checkpoint_digest: str
    """SHA-256 of the checkpoint's files."""
    precision: Precision
    """Of weights and activations."""
    embedding_dim: int
    """D of the embeddings."""
    preprocessing: Preprocessing
    """How images become pixels."""
    text: TextInput | None
    """None for an engine without a text tower."""
    quantization: Quantization | None = None
    """None unless the precision is fp8."""
    files: dict[str, str]
    """File name -> SHA-256 of its content."""
    versions: dict[str, str]
    """Library -> version at build time."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """`image`, and `text` where there is a text tower."""
        return ("image",) if self.text is None else ("image", "text")

    @property
    def weights(self) -> str | None:
        """SHA-256 of the weights of an fp8 engine, None for others.

        Rounding to FP8 takes sums whose last digits vary with the machine and its libraries, so
        that an fp8 engine built again can differ in some weights; others come out the same.
        """
        if self.precision != "fp8":
            return None
        files = sorted(f"{name} {self.files[name]}" for name in self.files if _is_weights(name))
        return hashlib.sha256("\n".join(files).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Write `manifest.json`, the last file of an engine."""
        record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        (directory / MANIFEST_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read an engine's manifest; EngineError if it is missing, cut short or of a newer format."""
    path = directory / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise EngineError(f"{directory}: no engine there ({MANIFEST_FILE} is missing)") from None
    return parse_manifest(content, path=str(path))


def parse_manifest(content: bytes, *, path: str) -> Manifest:
    """The manifest in a file's content.

    Args:
        content: Of `manifest.json`.
        path: Where it lies, for messages.

    Raises:
        DamagedError: It is cut short or malformed.
        EngineError: It is of a newer format.
    """
    try:
        record: dict[str, Any] = json.loads(content)
        version = record.pop("format_version")
        if version > FORMAT_VERSION:
            raise EngineError(f"{path}: written by a newer Clipmill (format {version}); upgrade")
        if version < 2:
            record["quantization"] = None
        preprocessing: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in record.pop("preprocessing").items()
        }
        text, quantization = record.pop("text"), record.pop("quantization")
        if quantization is not None:
            quantization["kept_in_16_bit"] = tuple(quantization["kept_in_16_bit"])
        return Manifest(
            preprocessing=Preprocessing(**preprocessing),
            text=None if text is None else TextInput(**text),
            quantization=None if quantization is None else Quantization(**quantization),
            **record,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(
            f"{path}: damaged ({error}); remove the folder, the next run builds it anew"
        ) from error


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def verify_files(files: Mapping[str, str], *, directory: Path) -> None:
    """Compare files with their checksums; DamagedError names the first that differs.

    Args:
        files: Name, with `/` between folders -> SHA-256.
        directory: Where they lie.
    """
    for name, digest in files.items():
        path = directory / name
        if not path.exists():
            raise DamagedError(f"{path} is missing")
        if file_digest(path) != digest:
            raise DamagedError(f"{path} does not match its checksum")
