"""CLIP's towers: OpenAI's and OpenCLIP's checkpoints in transformers' layout.

Knows the shapes and tensor names of CLIP, not where its weights lie or how they are executed.

Source: Radford et al. 2021 (arXiv 2103.00020); names and pooling as in transformers'
`modeling_clip.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine.families.backbone import (
    ImageTokens,
    NameRules,
    PixelBackbone,
    TokenBackbone,
    TokenRules,
    block_shape,
    num_patches,
    patch_embedding,
    square_size,
    tokens,
)
from engine.towers import MASKED, PreNormBlock, token_after

BLOCK_NAMES: NameRules = (
    (r"\.layers\.(\d+)\.layer_norm(\d)", r".blocks.\1.norm\2"),
    (r"\.layers\.(\d+)\.self_attn\.q_proj", r".blocks.\1.attention.query"),
    (r"\.layers\.(\d+)\.self_attn\.k_proj", r".blocks.\1.attention.key"),
    (r"\.layers\.(\d+)\.self_attn\.v_proj", r".blocks.\1.attention.value"),
    (r"\.layers\.(\d+)\.self_attn\.out_proj", r".blocks.\1.attention.output"),
    (r"\.layers\.(\d+)\.mlp", r".blocks.\1.feed_forward"),
)
IMAGE_NAMES: NameRules = (
    (r"^visual_projection", "projection"),
    # Dual encoders saved before transformers 5 say it twice.
    (r"^vision_model\.vision_model\.", "vision_model."),
    (r"^vision_model\.embeddings", "backbone"),
    (r"^vision_model\.pre_layrnorm", "backbone.pre_norm"),  # the spelling of the format
    (r"^vision_model\.post_layernorm", "backbone.post_norm"),
    (r"^vision_model\.encoder", "backbone"),
    *BLOCK_NAMES,
)
TEXT_NAMES: NameRules = (
    (r"^text_projection", "projection"),
    (r"^text_model\.embeddings", "backbone"),
    (r"^text_model\.final_layer_norm", "backbone.final_norm"),
    (r"^text_model\.encoder", "backbone"),
    *BLOCK_NAMES,
)

# `eos_token_id` 2 in a CLIP config stands for "the largest id of the row": the first configs
# carried a wrong id, and transformers keeps reading it so.
_LEGACY_EOS_TOKEN_ID = 2


class ImageBackbone(PixelBackbone):
    """CLIP's vision transformer: float [N, 3, H, W] -> [N, width], the class token."""

    def __init__(self, config: Any) -> None:
        """Take sizes from a `CLIPVisionConfig`."""
        super().__init__()
        shape = block_shape(config)
        self.width = shape.width
        self.image_size = square_size(config, "image_size")
        self.class_embedding = nn.Parameter(torch.empty(shape.width))
        self.patch_embedding = patch_embedding(config, bias=False)
        self.position_embedding = nn.Embedding(1 + num_patches(config), shape.width)
        self.pre_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.image_tokens = ImageTokens()
        self.blocks = nn.ModuleList(PreNormBlock(shape) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalized pixels."""
        positions = self.position_embedding.weight
        x = self.image_tokens(
            tokens(self.patch_embedding(pixels)),
            special=self.class_embedding + positions[:1],
            positions=positions[1:],
            norm=self.pre_norm,
        )
        return self.post_norm(token_after(self.blocks, x, position=0))


class TextBackbone(TokenBackbone):
    """CLIP's causal text transformer: int32 [N, T] -> [N, width], the end-of-text token."""

    causal_bias: Tensor

    def __init__(self, config: Any) -> None:
        """Take sizes from a `CLIPTextConfig`."""
        super().__init__()
        shape = block_shape(config)
        length = config.max_position_embeddings
        self.width = shape.width
        self.eos_token_id = config.eos_token_id
        is_legacy = self.eos_token_id == _LEGACY_EOS_TOKEN_ID
        self.token_rules = TokenRules(
            max_tokens=length,
            vocab_size=config.vocab_size,
            special_token_ids={} if is_legacy else {"eos": self.eos_token_id},
        )
        self.token_embedding = nn.Embedding(config.vocab_size, shape.width)
        self.position_embedding = nn.Embedding(length, shape.width)
        self.blocks = nn.ModuleList(PreNormBlock(shape) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        bias = torch.zeros(length, length).masked_fill(future, MASKED)
        self.register_buffer("causal_bias", bias, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Encode token ids; what follows the end-of-text token has no influence."""
        length = token_ids.shape[1]
        x = self.token_embedding(token_ids) + self.position_embedding.weight[:length]
        bias = self.causal_bias[:length, :length]
        end = self._end_of_text(token_ids)
        return self.final_norm(token_after(self.blocks, x, bias, position=end))

    def _end_of_text(self, token_ids: Tensor) -> Tensor:
        if self.eos_token_id == _LEGACY_EOS_TOKEN_ID:
            return token_ids.argmax(dim=-1)
        return (token_ids == self.eos_token_id).int().argmax(dim=-1)
