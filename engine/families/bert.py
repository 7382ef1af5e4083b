"""BERT as a text backbone: the text half of most vision-text dual encoders.

Knows the shapes and tensor names of BERT, not where its weights lie or how they are executed.

Source: Devlin et al. 2018 (arXiv 1810.04805); names and pooler as in transformers'
`modeling_bert.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.towers import MASKED, BlockShape, PostNormBlock

TEXT_NAMES = (
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


class TextBackbone(nn.Module):
    """BERT with its pooler: int32 [N, T], padded with `pad_token_id` -> [N, width]."""

    def __init__(self, config: Any) -> None:
        """Take sizes from a `BertConfig`."""
        super().__init__()
        positions = getattr(config, "position_embedding_type", None) or "absolute"
        if positions != "absolute":
            raise CheckpointError(f"BERT with {positions!r} position embeddings is not supported")
        shape = BlockShape(
            width=config.hidden_size,
            hidden_width=config.intermediate_size,
            num_heads=config.num_attention_heads,
            act=config.hidden_act,
            norm_eps=config.layer_norm_eps,
        )
        self.pad_token_id = config.pad_token_id
        self.special_token_ids = {"pad": self.pad_token_id}
        self.word_embedding = nn.Embedding(config.vocab_size, shape.width)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, shape.width)
        self.token_type_embedding = nn.Embedding(config.type_vocab_size, shape.width)
        self.embedding_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.blocks = nn.ModuleList(PostNormBlock(shape) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(shape.width, shape.width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Encode token ids; padding has no influence."""
        length = token_ids.shape[1]
        x = (
            self.word_embedding(token_ids)
            + self.position_embedding.weight[:length]
            + self.token_type_embedding.weight[0]
        )
        x = self.embedding_norm(x)
        padding = (token_ids == self.pad_token_id)[:, None, None, :]
        bias = padding.to(x.dtype) * MASKED
        for block in self.blocks:
            x = block(x, bias)
        return torch.tanh(self.pooler(x[:, 0]))
