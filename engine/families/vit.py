"""A plain vision transformer: alone, or as the image half of a vision-text dual encoder.

Knows the shapes and tensor names of ViT, not where its weights lie or how they are executed.

Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); names and pooler as in transformers'
`modeling_vit.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine.families.backbone import (
    ImageTokens,
    NameRules,
    PixelBackbone,
    block_shape,
    num_patches,
    patch_embedding,
    require,
    square_size,
    tokens,
)
from engine.towers import PreNormBlock, activation, token_after

# What ViT and DINOv2 share.
EMBEDDING_NAMES: NameRules = (
    (r"^visual_projection", "projection"),
    (r"^vision_model\.", ""),  # in a dual encoder
    (r"^embeddings\.cls_token", "backbone.class_embedding"),
    (r"^embeddings\.patch_embeddings\.projection", "backbone.patch_embedding"),
    (r"^embeddings\.position_embeddings", "backbone.position_embedding"),
    (r"^layernorm", "backbone.post_norm"),
    (r"^encoder\.layer", "backbone.blocks"),
    (r"\.attention\.attention\.(query|key|value)", r".attention.\1"),
    (r"\.attention\.output\.dense", ".attention.output"),
)
IMAGE_NAMES: NameRules = (
    *EMBEDDING_NAMES,
    (r"^pooler\.dense", "backbone.pooler"),
    (r"\.layernorm_before", ".norm1"),
    (r"\.layernorm_after", ".norm2"),
    (r"\.intermediate\.dense", ".feed_forward.fc1"),
    (r"(blocks\.\d+)\.output\.dense", r"\1.feed_forward.fc2"),
)


class ImageBackbone(PixelBackbone):
    """ViT with its pooler: float [N, 3, H, W] -> [N, width], from the class token."""

    def __init__(self, config: Any) -> None:
        """Take sizes from a `ViTConfig`."""
        super().__init__()
        require(config, "qkv_bias", True)
        shape = block_shape(config)
        self.width = config.pooler_output_size
        self.image_size = square_size(config, "image_size")
        self.patch_embedding = patch_embedding(config, bias=True)
        self.class_embedding = nn.Parameter(torch.empty(1, 1, shape.width))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + num_patches(config), shape.width))
        self.image_tokens = ImageTokens()
        self.blocks = nn.ModuleList(PreNormBlock(shape) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.pooler = nn.Linear(shape.width, self.width)
        # The default is one that no block uses.
        is_tanh = config.pooler_act == "tanh"
        self.pooler_act = torch.tanh if is_tanh else activation(config.pooler_act)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalized pixels."""
        positions = self.position_embedding[0]
        x = self.image_tokens(
            tokens(self.patch_embedding(pixels)),
            special=self.class_embedding[0] + positions[:1],
            positions=positions[1:],
        )
        return self.pooler_act(self.pooler(self.post_norm(token_after(self.blocks, x, position=0))))
