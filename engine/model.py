"""A checkpoint as two towers: picks the family, builds its modules, fills them with weights.

Knows nothing of how towers are quantized, exported or executed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.families import bert, clip
from engine.preprocess import Preprocessing
from engine.preprocessor_config import preprocessing_from_config
from engine.towers import ImageTower, Normalize, TextTower

NameRules = Sequence[tuple[str, str]]

# model_type of the half -> its backbone and the rules that rename its tensors. A new family is
# one file in engine/families and one line here.
IMAGE_BACKBONES: dict[str, tuple[type[nn.Module], NameRules]] = {
    "clip_vision_model": (clip.ImageBackbone, clip.IMAGE_NAMES),
}
TEXT_BACKBONES: dict[str, tuple[type[nn.Module], NameRules]] = {
    "clip_text_model": (clip.TextBackbone, clip.TEXT_NAMES),
    "bert": (bert.TextBackbone, bert.TEXT_NAMES),
}
# model_types of whole models: two halves, or the image half alone.
DUAL_MODELS = ("clip", "vision-text-dual-encoder")
IMAGE_MODELS = ("clip_vision_model",)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint's towers with what must be known to feed them."""

    image_tower: ImageTower
    """uint8 [N, H, W, 3] -> float32 [N, D]."""
    preprocessing: Preprocessing
    """How images become pixels for the image tower."""
    text_tower: TextTower | None
    """int32 [N, T] -> float32 [N, D]; None for an image-only checkpoint."""
    max_tokens: int | None
    """Longest T of the text tower, special tokens included."""
    special_token_ids: Mapping[str, int]
    """Roles (`eos`, `pad`) that the text tower knows by id; its tokenizer must agree."""
    embedding_dim: int
    """D."""


def load_model(checkpoint: Checkpoint) -> Model:
    """Build a checkpoint's towers in float32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: The family is not supported, or tensors or settings are missing or
            have other shapes than the config says; all of them are named.
    """
    model_type = checkpoint.model_type
    if model_type not in (*DUAL_MODELS, *IMAGE_MODELS):
        supported = ", ".join((*DUAL_MODELS, *IMAGE_MODELS))
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: models of type {model_type!r} are not supported "
            f"(supported: {supported})"
        )
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.directory))
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"checkpoint {checkpoint.name}: malformed config: {error}") from error
    image_config, text_config = config, None
    if model_type in DUAL_MODELS:
        image_config, text_config = config.vision_config, config.text_config
    embedding_dim = config.projection_dim
    weights = _load_weights(checkpoint)

    backbone, names = _backbone(IMAGE_BACKBONES, image_config, checkpoint=checkpoint)
    try:
        preprocessing = preprocessing_from_config(
            checkpoint.preprocessor_config, image_size=image_config.image_size
        )
    except ValueError as error:
        raise CheckpointError(f"checkpoint {checkpoint.name}: {error}") from error
    image_tower = ImageTower(
        normalize=Normalize(
            mean=preprocessing.mean,
            std=preprocessing.std,
            rescale_factor=preprocessing.rescale_factor,
        ),
        backbone=backbone,
        projection=nn.Linear(image_config.hidden_size, embedding_dim, bias=False),
    )
    _fill(image_tower, weights, names=names, checkpoint=checkpoint)

    text_tower, special_token_ids = None, {}
    if text_config is not None:
        backbone, names = _backbone(TEXT_BACKBONES, text_config, checkpoint=checkpoint)
        text_tower = TextTower(
            backbone=backbone,
            projection=nn.Linear(text_config.hidden_size, embedding_dim, bias=False),
        )
        _fill(text_tower, weights, names=names, checkpoint=checkpoint)
        special_token_ids = backbone.special_token_ids
    return Model(
        image_tower=image_tower.eval(),
        preprocessing=preprocessing,
        text_tower=None if text_tower is None else text_tower.eval(),
        max_tokens=None if text_config is None else text_config.max_position_embeddings,
        special_token_ids=special_token_ids,
        embedding_dim=embedding_dim,
    )


def _backbone(
    backbones: dict[str, tuple[type[nn.Module], NameRules]], config: Any, *, checkpoint: Checkpoint
) -> tuple[Any, NameRules]:
    if config.model_type not in backbones:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: a {config.model_type!r} half is not supported "
            f"(supported: {', '.join(backbones)})"
        )
    backbone, names = backbones[config.model_type]
    return backbone(config), names


def _load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in checkpoint.weight_paths:
        try:
            weights.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); fetch it again"
            ) from error
    return weights


def _fill(
    tower: nn.Module, weights: dict[str, Tensor], *, names: NameRules, checkpoint: Checkpoint
) -> None:
    wanted = tower.state_dict()
    faults, found = [], {}
    for theirs, tensor in weights.items():
        ours = theirs
        for pattern, replacement in names:
            ours = re.sub(pattern, replacement, ours)
        if ours in wanted and ours != theirs:
            found[ours] = tensor.float()
            if tensor.shape != wanted[ours].shape:
                faults.append(
                    f"{theirs} is {list(tensor.shape)}, config says {list(wanted[ours].shape)}"
                )
    faults += [f"{name} is missing" for name in wanted if name not in found]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: weights do not fit its config: "
            f"{'; '.join(faults[:5])}{more}"
        )
    tower.load_state_dict(found)
