"""SigLIP's towers, and those of SigLIP 2's checkpoints of fixed resolution.

Knows the shapes and tensor names of SigLIP, not where its weights lie or how they are executed.

The `logit_scale` and `logit_bias` of the sigmoid loss are no part of a tower: both are the same
for all pairs, and the cosine alone ranks alike.

Source: Zhai et al. 2023 (arXiv 2303.15343), Tschannen et al. 2025 (arXiv 2502.14786); names and
pooling as in transformers' `modeling_siglip.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine.families.backbone import (
    NameRules,
    PixelBackbone,
    TokenBackbone,
    TokenRules,
    block_shape,
    num_patches,
    patch_embedding,
    require,
    square_size,
    tokens,
)
from engine.families.clip import BLOCK_NAMES
from engine.towers import BlockShape, PreNormBlock, activation, token_after

IMAGE_NAMES: NameRules = (
    (r"^visual_projection", "projection"),
    # None alone, one in a whole model, two in dual encoders saved before transformers 5.
    (r"^(vision_model\.)+", ""),
    (r"^embeddings", "backbone"),
    (r"^post_layernorm", "backbone.post_norm"),
    (r"^encoder", "backbone"),
    (
        r"^head\.attention\.in_proj_(weight|bias)",
        r"backbone.pooler.query.\1|backbone.pooler.key.\1|backbone.pooler.value.\1",
    ),
    (r"^head\.attention\.out_proj", "backbone.pooler.output"),
    (r"^head\.layernorm", "backbone.pooler.norm"),
    (r"^head\.(mlp\.)?", "backbone.pooler."),
    *BLOCK_NAMES,
)
TEXT_NAMES: NameRules = (
    (r"^text_projection", "projection"),
    (r"^text_model\.embeddings", "backbone"),
    (r"^text_model\.final_layer_norm", "backbone.final_norm"),
    (r"^text_model\.head", "backbone.head"),
    (r"^text_model\.encoder", "backbone"),
    *BLOCK_NAMES,
)


class AttentionPooler(nn.Module):
    """One learned query attends to all tokens: float [N, T, width] -> [N, width].

    It has no quantization points: about 1 % of a tower's operations are not worth the error.
    """

    def __init__(self, shape: BlockShape) -> None:
        """Build from the sizes of the blocks before it."""
        super().__init__()
        self.width = shape.width
        self.num_heads = shape.num_heads
        self.probe = nn.Parameter(torch.empty(1, 1, shape.width))
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)
        self.output = nn.Linear(shape.width, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.fc1 = nn.Linear(shape.width, shape.hidden_width)
        self.fc2 = nn.Linear(shape.hidden_width, shape.width)
        self.act = activation(shape.act)

    def forward(self, x: Tensor) -> Tensor:
        """Pool the tokens."""
        num_rows, length, _ = x.shape
        heads = (self.num_heads, self.width // self.num_heads)
        query = (self.query(self.probe) * heads[1] ** -0.5).view(1, 1, *heads).transpose(1, 2)
        key = self.key(x).view(num_rows, length, *heads).permute(0, 2, 3, 1)
        value = self.value(x).view(num_rows, length, *heads).transpose(1, 2)
        mixed = (query @ key).softmax(dim=-1) @ value
        pooled = self.output(mixed.view(num_rows, self.width))
        return pooled + self.fc2(self.act(self.fc1(self.norm(pooled))))


class ImageBackbone(PixelBackbone):
    """SigLIP's vision transformer: float [N, 3, H, W] -> [N, width], by attention pooling."""

    def __init__(self, config: Any) -> None:
        """Take sizes from a `SiglipVisionConfig`."""
        super().__init__()
        if hasattr(config, "vision_use_head"):  # older transformers pool without being told
            require(config, "vision_use_head", True)
        shape = block_shape(config)
        self.width = shape.width
        self.image_size = square_size(config, "image_size")
        self.patch_embedding = patch_embedding(config, bias=True)
        self.position_embedding = nn.Embedding(num_patches(config), shape.width)
        self.blocks = nn.ModuleList(PreNormBlock(shape) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.pooler = AttentionPooler(shape)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalized pixels."""
        x = tokens(self.patch_embedding(pixels)) + self.position_embedding.weight
        for block in self.blocks:
            x = block(x)
        return self.pooler(self.post_norm(x))


class TextBackbone(TokenBackbone):
    """SigLIP's text transformer: int32 [N, max_tokens] -> [N, width], from the last token.

    Every token sees every other, padding included, and the last is padding in most texts.
    """

    def __init__(self, config: Any) -> None:
        """Take sizes from a `SiglipTextConfig`."""
        super().__init__()
        shape = block_shape(config)
        self.width = config.projection_size
        # No id is looked for; those in SigLIP's configs are not its tokenizer's.
        self.token_rules = TokenRules(
            max_tokens=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            pads_to_max=True,
        )
        self.token_embedding = nn.Embedding(config.vocab_size, shape.width)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, shape.width)
        self.blocks = nn.ModuleList(PreNormBlock(shape) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.head = nn.Linear(shape.width, self.width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Encode token ids, padded to `max_tokens`."""
        length = token_ids.shape[1]
        x = self.token_embedding(token_ids) + self.position_embedding.weight[:length]
        return self.head(self.final_norm(token_after(self.blocks, x, position=-1)))
