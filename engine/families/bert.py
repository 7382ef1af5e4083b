"""BERT as a text backbone: the text half of most vision-text dual encoders.

Knows the shapes and tensor names of BERT, not where its weights lie or how they are executed.

Source: Devlin et al. 2018 (arXiv 1810.04805); names and pooler as in transformers'
`modeling_bert.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.families.backbone import NameRules, TokenBackbone, TokenRules, block_shape
from engine.towers import MASKED, PostNormBlock, token_after

TEXT_NAMES: NameRules = (
    (r"^text_projection", "projection"),
    (r"^text_model\.embeddings\.LayerNorm", "backbone.embedding_norm"),
    (r"^text_model\.embeddings\.(word|position|token_type)_embeddings", r"backbone.\1_embedding"),
    (r"^text_model\.pooler\.dense", "backbone.pooler"),
    (r"^text_model\.encoder\.layer", "backbone.blocks"),
    (r"\.attention\.self\.(query|key|value)", r".attention.\1"),
    (r"\.attention\.output\.dense", ".attention.output"),
    (r"\.attention\.output\.LayerNorm", ".norm1"),
    (r"\.intermediate\.dense", ".feed_forward.fc1"),
    (r"(blocks\.\d+)\.output\.dense", r"\1.feed_forward.fc2"),
    (r"(blocks\.\d+)\.output\.LayerNorm", r"\1.norm2"),
)


class TextBackbone(TokenBackbone):
    """BERT with its pooler: int32 [N, T], padded at the end with `pad_token_id` -> [N, width]."""

    def __init__(self, config: Any) -> None:
        """Take sizes from a `BertConfig`."""
        super().__init__()
        positions = getattr(config, "position_embedding_type", None) or "absolute"
        if positions != "absolute":
            raise CheckpointError(f"BERT with {positions!r} position embeddings is not supported")
        shape = block_shape(config)
        self.width = shape.width
        self.pad_token_id = config.pad_token_id
        self.first_position = self._first_position()
        self.token_rules = TokenRules(
            max_tokens=config.max_position_embeddings - self.first_position,
            vocab_size=config.vocab_size,
            special_token_ids={"pad": self.pad_token_id},
        )
        self.word_embedding = nn.Embedding(config.vocab_size, shape.width)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, shape.width)
        self.token_type_embedding = nn.Embedding(config.type_vocab_size, shape.width)
        self.embedding_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.blocks = nn.ModuleList(PostNormBlock(shape) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(shape.width, shape.width)

    def _first_position(self) -> int:
        """The row of the position table that belongs to the first token."""
        return 0

    def forward(self, token_ids: Tensor) -> Tensor:
        """Encode token ids; padding has no influence."""
        first, end = self.first_position, self.first_position + token_ids.shape[1]
        x = (
            self.word_embedding(token_ids)
            + self.position_embedding.weight[first:end]
            + self.token_type_embedding.weight[0]
        )
        x = self.embedding_norm(x)
        padding = (token_ids == self.pad_token_id)[:, None, None, :]
        bias = padding.to(x.dtype) * MASKED
        return torch.tanh(self.pooler(token_after(self.blocks, x, bias, position=0)))
