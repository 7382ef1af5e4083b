"""CLIP ViT-B/32 and ViT-L/14 in full size with random weights: ours, and transformers' own.

Knows nothing of engines.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from engine.families import clip
from engine.towers import ImageTower, Normalize, TextTower

IMAGE_SIZE, MAX_TOKENS = 224, 77
BOS_ID, EOS_ID, NUM_IDS = 49406, 49407, 49408
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a CLIP, as OpenAI's configs have them."""

    image: dict[str, int]
    text: dict[str, int]
    embedding_dim: int


def _half(width: int, num_blocks: int, num_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": num_heads,
    }


SIZES = {
    "B/32": Size(
        image={**_half(768, 12, 12), "patch_size": 32}, text=_half(512, 12, 8), embedding_dim=512
    ),
    "L/14": Size(
        image={**_half(1024, 24, 16), "patch_size": 14}, text=_half(768, 12, 12), embedding_dim=768
    ),
}


def image_towers(size: Size, *, device: torch.device) -> tuple[ImageTower, nn.Module]:
    """Our tower in float32, and transformers' model with the same weights."""
    config = CLIPVisionConfig(
        **size.image, image_size=IMAGE_SIZE, projection_dim=size.embedding_dim
    )
    with device:
        theirs = _perturbed(CLIPVisionModelWithProjection(config))
        tower = ImageTower(
            normalize=Normalize(mean=MEAN, std=STD, rescale_factor=1 / 255),
            backbone=clip.ImageBackbone(config),
            projection=nn.Linear(config.hidden_size, size.embedding_dim, bias=False),
        )
    return _filled(tower, theirs, clip.IMAGE_NAMES), theirs


def text_towers(size: Size, *, device: torch.device) -> tuple[TextTower, nn.Module]:
    """Our tower in float32, and transformers' model with the same weights."""
    config = CLIPTextConfig(
        **size.text,
        vocab_size=NUM_IDS,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=size.embedding_dim,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    with device:
        theirs = _perturbed(CLIPTextModelWithProjection(config))
        tower = TextTower(
            backbone=clip.TextBackbone(config),
            projection=nn.Linear(config.hidden_size, size.embedding_dim, bias=False),
        )
    return _filled(tower, theirs, clip.TEXT_NAMES), theirs


def blurred_pixels(num_rows: int, *, seed: int, device: torch.device) -> Tensor:
    """Random images with large and small shapes, unlike noise, whose patches are all alike."""
    generator = torch.Generator(device).manual_seed(seed)
    image = torch.zeros(num_rows, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    for cells, strength in ((3, 80), (14, 40), (56, 20)):
        noise = torch.randn(num_rows, 3, cells, cells, generator=generator, device=device)
        image += strength * functional.interpolate(noise, size=IMAGE_SIZE, mode="bilinear")
    return (image + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def captions(num_rows: int, *, seed: int, length: int | None = None) -> Tensor:
    """Token ids int32 of texts with 5 to 30 tokens, longest last, padded to `length`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 31, (num_rows,), generator=generator).sort().values.tolist()
    ids = torch.randint(1000, 40000, (num_rows, MAX_TOKENS), dtype=torch.int32, generator=generator)
    ids[:, 0] = BOS_ID
    for row, end in zip(ids, lengths, strict=True):
        row[end - 1 :] = EOS_ID
    return ids[:, : length or MAX_TOKENS].contiguous()


@torch.no_grad()
def _perturbed(model: Any) -> Any:
    # Fresh models have biases of 0 and norms of 1, which would hide what is left out.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "class_embedding" not in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _filled(tower: Any, theirs: nn.Module, names: Any) -> Any:
    found = {}
    for name, tensor in theirs.state_dict().items():
        ours = name
        for pattern, replacement in names:
            ours = re.sub(pattern, replacement, ours)
        if ours != name:
            found[ours] = tensor
    tower.load_state_dict({name: found[name] for name in tower.state_dict()})
    return tower.eval().requires_grad_(False)
