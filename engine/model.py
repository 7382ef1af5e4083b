"""A checkpoint as two towers: picks the family, builds its modules, fills them with weights.

Knows nothing of how towers are quantized, exported or executed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.families import bert, clip, dinov2, roberta, siglip, vit
from engine.families.backbone import NameRules, PixelBackbone, TokenBackbone, TokenRules
from engine.preprocess import Preprocessing
from engine.preprocessor_config import preprocessing_from_config
from engine.towers import ImageTower, Normalize, TextTower

Backbone = TypeVar("Backbone", PixelBackbone, TokenBackbone)
Backbones = Mapping[str, tuple[type[Backbone], NameRules]]

# model_type of the half -> its backbone and the rules that rename its tensors. A new family is
# one file in engine/families and one line here.
IMAGE_BACKBONES: Backbones[PixelBackbone] = {
    "clip_vision_model": (clip.ImageBackbone, clip.IMAGE_NAMES),
    "siglip_vision_model": (siglip.ImageBackbone, siglip.IMAGE_NAMES),
    "dinov2": (dinov2.ImageBackbone, dinov2.IMAGE_NAMES),
    "dinov2_with_registers": (dinov2.ImageBackbone, dinov2.IMAGE_NAMES),
    "vit": (vit.ImageBackbone, vit.IMAGE_NAMES),
}
TEXT_BACKBONES: Backbones[TokenBackbone] = {
    "clip_text_model": (clip.TextBackbone, clip.TEXT_NAMES),
    "siglip_text_model": (siglip.TextBackbone, siglip.TEXT_NAMES),
    "bert": (bert.TextBackbone, bert.TEXT_NAMES),
    "roberta": (roberta.TextBackbone, bert.TEXT_NAMES),
    "xlm-roberta": (roberta.TextBackbone, bert.TEXT_NAMES),
    "camembert": (roberta.TextBackbone, bert.TEXT_NAMES),
}
# model_types of whole models: two halves, or the image half alone.
DUAL_MODELS = ("clip", "siglip", "vision-text-dual-encoder")
IMAGE_MODELS = tuple(IMAGE_BACKBONES)
# Of these, the models that project what their halves give to `projection_dim`.
PROJECTED_MODELS = ("clip", "vision-text-dual-encoder", "clip_vision_model")
# model_type -> what to use in its place.
INSTEAD = {
    "siglip2": "its NaFlex checkpoints take images of varying shape; use one of fixed resolution, "
    "such as google/siglip2-base-patch16-224",
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint's towers with what must be known to feed them."""

    image_tower: ImageTower
    """uint8 [N, H, W, 3] -> float32 [N, D]."""
    preprocessing: Preprocessing
    """How images become pixels for the image tower."""
    text_tower: TextTower | None
    """int32 [N, T] -> float32 [N, D]; None for an image-only checkpoint."""
    token_rules: TokenRules | None
    """What the text tower asks of its tokenizer; None without a text tower."""
    embedding_dim: int
    """D."""

    def settle(self) -> None:
        """Compute once what depends on the weights and the images' size alone."""
        backbone = self.image_tower.backbone
        assert isinstance(backbone, PixelBackbone)
        backbone.settle(height=self.preprocessing.height, width=self.preprocessing.width)


def load_model(checkpoint: Checkpoint) -> Model:
    """Build a checkpoint's towers in float32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: The family is not supported, or tensors or settings are missing or
            have other shapes than the config says; all of them are named.
    """
    try:
        config = read_config(checkpoint.directory)
        image_names, text_names = _name_rules(config)
        model = build_model(config, preprocessing=_preprocessing(checkpoint))
        weights = _load_weights(checkpoint)
        _fill(model.image_tower, weights, names=image_names)
        if model.text_tower is not None:
            _fill(model.text_tower, weights, names=text_names)
        model.settle()
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {checkpoint.name}: {error}") from error
    return model


def read_config(directory: Path) -> Any:
    """Read the `config.json` in a folder as transformers' config.

    Raises:
        CheckpointError: It is malformed, or of a type that is not supported.
    """
    model_type = str(PreTrainedConfig.get_config_dict(str(directory))[0].get("model_type"))
    supported = (*DUAL_MODELS, *IMAGE_MODELS)
    if model_type not in supported:
        way_out = INSTEAD.get(model_type, f"supported: {', '.join(supported)}")
        raise CheckpointError(f"models of type {model_type!r} are not supported ({way_out})")
    try:
        return AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"malformed config: {error}") from error


def build_model(config: Any, *, preprocessing: Preprocessing) -> Model:
    """Build towers in the sizes of a config, in evaluation mode, yet without weights.

    Fill them with a checkpoint's tensors and call `settle`; or call it first and fill them with
    tensors of towers that were settled.

    Raises:
        CheckpointError: A half or one of its settings is not supported, or the images have
            another size than the model takes.
    """
    image_config, text_config = _halves(config)
    projection_dim = config.projection_dim if config.model_type in PROJECTED_MODELS else None
    image = _family(IMAGE_BACKBONES, image_config)[0](image_config)
    size = (preprocessing.height, preprocessing.width)
    if image.image_size is not None and size != (image.image_size, image.image_size):
        raise CheckpointError(
            f"preprocessor_config.json gives images of {size[0]}x{size[1]} pixels (height x "
            f"width), but the model's image_size is {image.image_size}"
        )
    image_tower = ImageTower(
        normalize=Normalize(
            mean=preprocessing.mean,
            std=preprocessing.std,
            rescale_factor=preprocessing.rescale_factor,
        ),
        backbone=image,
        projection=_projection(image.width, projection_dim),
    )
    text, text_tower = None, None
    if text_config is not None:
        text = _family(TEXT_BACKBONES, text_config)[0](text_config)
        text_tower = TextTower(backbone=text, projection=_projection(text.width, projection_dim))
        if projection_dim is None and text.width != image.width:
            raise CheckpointError(
                f"image embeddings have {image.width} dimensions, text embeddings {text.width}"
            )
    return Model(
        image_tower=image_tower.eval(),
        preprocessing=preprocessing,
        text_tower=None if text_tower is None else text_tower.eval(),
        token_rules=None if text is None else text.token_rules,
        embedding_dim=projection_dim or image.width,
    )


def _halves(config: Any) -> tuple[Any, Any]:
    if config.model_type in DUAL_MODELS:
        return config.vision_config, config.text_config
    return config, None


def _family(backbones: Backbones[Backbone], config: Any) -> tuple[type[Backbone], NameRules]:
    if config.model_type not in backbones:
        raise CheckpointError(
            f"a {config.model_type!r} half is not supported (supported: {', '.join(backbones)})"
        )
    return backbones[config.model_type]


def _name_rules(config: Any) -> tuple[NameRules, NameRules]:
    image_config, text_config = _halves(config)
    image_names = _family(IMAGE_BACKBONES, image_config)[1]
    return image_names, () if text_config is None else _family(TEXT_BACKBONES, text_config)[1]


def _projection(width: int, projection_dim: int | None) -> nn.Module:
    if projection_dim is None:
        return nn.Identity()
    return nn.Linear(width, projection_dim, bias=False)


def _preprocessing(checkpoint: Checkpoint) -> Preprocessing:
    try:
        return preprocessing_from_config(checkpoint.preprocessor_config)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


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


def _fill(tower: nn.Module, weights: Mapping[str, Tensor], *, names: NameRules) -> None:
    wanted = tower.state_dict()
    faults, found = [], {}
    for theirs, tensor in weights.items():
        ours = theirs
        for pattern, replacement in names:
            ours = re.sub(pattern, replacement, ours)
        parts = [name for name in ours.split("|") if name in wanted]
        if not parts or ours == theirs:
            continue
        for name, part in zip(parts, torch.atleast_1d(tensor).chunk(len(parts)), strict=False):
            found[name] = part.float()
            if part.shape != wanted[name].shape:
                faults.append(
                    f"{theirs} is {list(part.shape)}, config says {list(wanted[name].shape)}"
                )
    faults += [f"{name} is missing" for name in wanted if name not in found]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"weights do not fit its config: {'; '.join(faults[:5])}{more}")
    tower.load_state_dict(found)
