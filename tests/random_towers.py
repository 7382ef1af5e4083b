"""Towers with random weights, of any size: of CLIP, BERT, and other families of images.

Knows nothing of checkpoints.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from engine.families import bert, clip, dinov2, siglip, vit
from engine.families.backbone import PixelBackbone
from engine.towers import ImageTower, Normalize, TextTower

IMAGE_SIZE, MAX_TOKENS, NUM_IDS, EMBEDDING_DIM = 32, 80, 64, 24
EOS_ID, PAD_ID = NUM_IDS - 1, 0
# Widths that are multiples of 16, as FP8 products need, but no powers of two, as kernels prefer.
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGE = {"image_size": IMAGE_SIZE, "patch_size": 8}


def image_tower(*, act: str = "quick_gelu") -> ImageTower:
    return _image_tower(clip.ImageBackbone(CLIPVisionConfig(**SIZES, **IMAGE, hidden_act=act)))


def vit_tower() -> ImageTower:
    return _image_tower(vit.ImageBackbone(ViTConfig(**SIZES, **IMAGE)))


def siglip_tower() -> ImageTower:
    return _image_tower(siglip.ImageBackbone(SiglipVisionConfig(**SIZES, **IMAGE)))


def dinov2_tower() -> ImageTower:
    """With registers, and positions of larger images."""
    sizes = {**SIZES, **IMAGE, "image_size": 2 * IMAGE_SIZE}
    return _image_tower(
        dinov2.ImageBackbone(Dinov2WithRegistersConfig(**sizes, num_register_tokens=4))
    )


def clip_text_tower() -> TextTower:
    config = CLIPTextConfig(
        **SIZES,
        vocab_size=NUM_IDS,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        hidden_act="gelu",
    )
    return _text_tower(clip.TextBackbone(config))


def bert_tower() -> TextTower:
    config = BertConfig(
        **SIZES, vocab_size=NUM_IDS, max_position_embeddings=MAX_TOKENS, pad_token_id=PAD_ID
    )
    return _text_tower(bert.TextBackbone(config))


def pixels(num_rows: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, IMAGE_SIZE, IMAGE_SIZE, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def token_ids(num_rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Rows of different lengths, each with an end, then padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, EOS_ID, (num_rows, length), dtype=torch.int32, generator=generator)
    for row, end in enumerate(torch.linspace(length - 1, 1, num_rows).int().tolist()):
        ids[row, end] = EOS_ID
        ids[row, end + 1 :] = PAD_ID
    return ids


def randomize(tower: nn.Module, *, seed: int = 0) -> None:
    """Fill a tower so that activations keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if re.search(r"norm\d?\.weight$", name):
                parameter.copy_(1 + 0.2 * noise)
            elif "embedding" in name and "patch" not in name:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.2 * noise)
            # So that query, key and value are quantized with scales of their own.
            if ".query.weight" in name:
                parameter.mul_(0.5)
            elif ".key.weight" in name:
                parameter.mul_(2)


def _image_tower(backbone: PixelBackbone) -> ImageTower:
    tower = ImageTower(
        normalize=Normalize(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), rescale_factor=1 / 255),
        backbone=backbone,
        projection=nn.Linear(backbone.width, EMBEDDING_DIM, bias=False),
    )
    randomize(tower)
    backbone.settle(height=IMAGE_SIZE, width=IMAGE_SIZE)
    return tower.eval()


def _text_tower(backbone: nn.Module) -> TextTower:
    projection = nn.Linear(SIZES["hidden_size"], EMBEDDING_DIM, bias=False)
    tower = TextTower(backbone=backbone, projection=projection)
    randomize(tower)
    return tower.eval()
