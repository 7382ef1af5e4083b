"""Towers -> ONNX, and a checkpoint's tokenizer -> one file that needs no transformers.

Knows nothing of where an engine is kept or who runs it.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.jit._trace import TracerWarning
from transformers import AutoTokenizer

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.towers import ImageTower, TextTower

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OPSET = 20  # LayerNormalization (17) and Gelu (20) as single nodes
PIXELS, TOKEN_IDS, EMBEDDINGS = "pixels", "token_ids", "embeddings"


def export_image_tower(tower: ImageTower, *, height: int, width: int, path: Path) -> None:
    """Write `pixels` uint8 [N, height, width, 3] -> `embeddings` float32 [N, D] as ONNX."""
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    _export(tower, example, input_name=PIXELS, dynamic=("batch",), path=path)


def export_text_tower(tower: TextTower, *, path: Path) -> None:
    """Write `token_ids` int32 [N, T] -> `embeddings` float32 [N, D] as ONNX."""
    example = torch.ones(2, 8, dtype=torch.int32)
    _export(tower, example, input_name=TOKEN_IDS, dynamic=("batch", "length"), path=path)


def _export(
    tower: torch.nn.Module,
    example: torch.Tensor,
    *,
    input_name: str,
    dynamic: tuple[str, ...],
    path: Path,
) -> None:
    with warnings.catch_warnings():
        # The TorchScript exporter is the one that quantized towers go through too.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)
        torch.onnx.export(
            tower,
            (example,),
            str(path),
            input_names=[input_name],
            output_names=[EMBEDDINGS],
            dynamic_axes={input_name: dict(enumerate(dynamic)), EMBEDDINGS: {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )


def export_tokenizer(
    checkpoint: Checkpoint, *, max_tokens: int, special_token_ids: Mapping[str, int], path: Path
) -> tuple[int, int]:
    """Write a `tokenizer.json` that cuts at the text tower's length and does not pad.

    Args:
        checkpoint: Where the tokenizer files lie.
        max_tokens: The text tower's longest row.
        special_token_ids: Roles (`eos`, `pad`) that the text tower knows by id.
        path: The file to write, for `tokenizers.Tokenizer.from_file`.

    Returns:
        Tokens after which a text is cut (special tokens included), and the padding id.

    Raises:
        CheckpointError: The tokenizer is missing, malformed, has no padding token, or gives a
            special token another id than the text tower looks for.
    """
    if not checkpoint.has_tokenizer:
        raise CheckpointError(f"checkpoint {checkpoint.name}: tokenizer.json is missing")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.directory))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: malformed tokenizer: {error}"
        ) from error
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"checkpoint {checkpoint.name}: its tokenizer has no padding token")
    for role, token_id in special_token_ids.items():
        found = getattr(tokenizer, f"{role}_token_id")
        if found != token_id:
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: {role}_token_id is {token_id} in its config and "
                f"{found} in its tokenizer, so that texts would be misread; bring the tokenizer "
                "and the config of the same model"
            )
    length = min(max_tokens, int(tokenizer.model_max_length))
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.save(str(path))
    return length, int(tokenizer.pad_token_id)
