"""Which model: finds a checkpoint on the hub or on disk and says what it holds.

Knows nothing of torch, of preprocessing or of how towers are built.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",  # XLM-RoBERTa's and CamemBERT's
)

# The only files fetched from a hub: no pickle and no code comes with them.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model")
# Beside its index. Pickles (.bin, .pt) are never loaded: to load one is to run what is in it.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A transformers-layout folder on this machine, known to have the files that it needs."""

    name: str
    """As the user gave it: a hub id or a folder."""
    revision: str | None
    """The hub commit (40 hex digits), None for a folder."""
    directory: Path
    """Where the files lie."""
    config: Mapping[str, Any]
    """The parsed `config.json`."""

    @property
    def location(self) -> str:
        """Where it is found again, from anywhere: the hub id, or the folder in full."""
        return self.name if self.revision else str(self.directory)

    @property
    def model_type(self) -> str:
        """The family's name in `config.json`, for example `clip`."""
        return str(self.config["model_type"])

    @property
    def weight_paths(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        single = self.directory / WEIGHTS_FILE
        if single.exists():
            return [single]
        path = self.directory / WEIGHTS_INDEX_FILE
        weight_map = _read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path}: no 'weight_map'; fetch it again")
        for name in weight_map.values():
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise CheckpointError(
                    f"{path}: names {name!r}, which is no safetensors file of this folder; save "
                    "the checkpoint again with save_pretrained, which writes safetensors"
                )
        return [self.directory / name for name in sorted(set(weight_map.values()))]

    @property
    def preprocessor_config(self) -> Mapping[str, Any]:
        """The image processor's parsed settings; CheckpointError if there are none.

        They lie in `processor_config.json` where transformers 5 saved a whole processor, as
        `image_processor`, or else in `preprocessor_config.json`; transformers prefers the first.
        """
        path = self.directory / PROCESSOR_FILE
        nested = _read_json(path).get("image_processor") if path.exists() else None
        if isinstance(nested, dict):
            return nested
        return _read_json(self.directory / PREPROCESSOR_FILE)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer file lies in the folder."""
        return any((self.directory / name).exists() for name in TOKENIZER_FILES)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of every file that an embedding depends on."""
        names = [CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, "tokenizer_config.json"]
        names += ["merges.txt", "special_tokens_map.json", "added_tokens.json", *TOKENIZER_FILES]
        paths = [self.directory / name for name in names] + self.weight_paths
        digest = hashlib.sha256()
        for path in sorted(path for path in paths if path.exists()):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name}:{content}\n".encode())
        return digest.hexdigest()


def find_checkpoint(name: str, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint by folder or hub id and check that its files are there.

    Args:
        name: A folder (tried first) or a hub id such as `openai/clip-vit-base-patch32`.
        revision: A hub branch, tag or commit; the commit it stands for is what is recorded.

    Raises:
        CheckpointError: No such folder or hub id, or files are missing or malformed; says which.
        ValueError: A folder was given a revision.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r}: a folder ({name}) has none; leave it out")
        return _open(name, directory=directory.resolve(), revision=None)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"checkpoint {name!r}: no such folder, and not a hub id (like 'owner/name') either"
        )
    directory = _download(name, revision=revision)
    # Snapshot folders of the hub cache are named for their commit.
    return _open(name, directory=directory, revision=directory.name)


def _download(name: str, *, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS))
    # The hub's answers that are errors are OSErrors; HTTPError is what its transport raises when a
    # connection breaks, of httpx or its successor.
    except (OSError, HTTPError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise CheckpointError(
            f"checkpoint {name!r}{at}: no such folder here, and the hub did not give it "
            f"({reason}). Check the id and the network, or name a local folder."
        ) from error
    return Path(found)


def _open(name: str, *, directory: Path, revision: str | None) -> Checkpoint:
    config = _read_json(directory / CONFIG_FILE)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{directory / CONFIG_FILE}: no 'model_type'; not a transformers one")
    if not ((directory / WEIGHTS_FILE).exists() or (directory / WEIGHTS_INDEX_FILE).exists()):
        pickled = sorted(
            path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES
        )
        note = f" ({', '.join(pickled)} is a pickle and is never loaded)" if pickled else ""
        raise CheckpointError(
            f"checkpoint {name}: no {WEIGHTS_FILE} in {directory}{note}; convert it to "
            "safetensors: where you trust it, load it with transformers, then save_pretrained"
        )
    checkpoint = Checkpoint(name=name, revision=revision, directory=directory, config=config)
    missing = [path.name for path in checkpoint.weight_paths if not path.exists()]
    if missing:
        raise CheckpointError(f"checkpoint {name}: missing weight files: {', '.join(missing)}")
    return checkpoint


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed
