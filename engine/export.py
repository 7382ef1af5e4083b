"""Towers -> ONNX, and a checkpoint's tokenizer -> one file that needs no transformers.

Knows nothing of where an engine is kept or who runs it.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.jit._trace import TracerWarning
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.families.backbone import TokenRules
from engine.families.siglip_tokenizer import siglip_tokenizer
from engine.manifest import TextInput
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


def export_tokenizer(checkpoint: Checkpoint, *, rules: TokenRules, path: Path) -> TextInput:
    """Write a `tokenizer.json` that cuts at the text tower's length and does not pad.

    Args:
        checkpoint: Where the tokenizer files lie.
        rules: What the text tower asks of it.
        path: The file to write, for `tokenizers.Tokenizer.from_file`.

    Returns:
        How texts become token ids with that file.

    Raises:
        CheckpointError: The tokenizer is missing, malformed, cannot be written as one file, has no
            padding token, or is not the one that the text tower was trained with.
    """
    try:
        tokenizer = _tokenizer(checkpoint)
        _check_tokenizer(tokenizer, rules=rules)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {checkpoint.name}: {error}") from error
    length = min(rules.max_tokens, int(tokenizer.model_max_length))
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.save(str(path))
    return TextInput(
        max_tokens=length,
        pad_token_id=int(tokenizer.pad_token_id),
        pads_to_max=rules.pads_to_max,
    )


def _tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer as transformers gives it, one with a `backend_tokenizer`."""
    if not checkpoint.has_tokenizer:
        raise CheckpointError("tokenizer.json is missing")
    folder = str(checkpoint.directory)
    try:
        config = get_tokenizer_config(folder)
        # As AutoTokenizer chooses where the configs name no class.
        default = "SiglipTokenizer" if checkpoint.model_type == "siglip" else None
        name = config.get("tokenizer_class") or checkpoint.config.get("tokenizer_class") or default
        if name == "SiglipTokenizer":
            return siglip_tokenizer(checkpoint.directory, config=config)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(f"malformed tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"its tokenizer is a {type(tokenizer).__name__}, which cannot be written as a "
            "tokenizer.json; save the checkpoint with a PreTrainedTokenizerFast that agrees with it"
        )
    return tokenizer


def _check_tokenizer(tokenizer: Any, *, rules: TokenRules) -> None:
    """Raise CheckpointError unless its ids are those that the text tower was trained with."""
    if tokenizer.pad_token_id is None:
        raise CheckpointError("its tokenizer has no padding token")
    way_out = "so that texts would be misread; bring the tokenizer and the config of the same model"
    for role, token_id in rules.special_token_ids.items():
        found = getattr(tokenizer, f"{role}_token_id")
        if found != token_id:
            raise CheckpointError(
                f"{role}_token_id is {token_id} in its config and {found} in its tokenizer, "
                f"{way_out}"
            )
    # Without added tokens: some come from a class's defaults and occur in no text.
    num_tokens = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    num_ids = max(num_tokens, tokenizer.pad_token_id + 1)
    if num_ids > rules.vocab_size:
        raise CheckpointError(
            f"vocab_size is {rules.vocab_size} in its config and {num_ids} in its tokenizer, "
            f"{way_out}"
        )
    if rules.pads_to_max and tokenizer.padding_side != "right":
        raise CheckpointError(
            "its tokenizer pads at the left, and only padding at the right is supported where the "
            "text tower sees it; set padding_side to right in tokenizer_config.json if the model "
            "was trained so"
        )
