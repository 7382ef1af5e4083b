"""What every family gives: backbones that say what they need, and the names of their tensors.

Knows no family, only how transformers' configs spell what they have in common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.towers import BlockShape

# transformers' names -> ours, as regular expressions applied in order to every tensor of a
# checkpoint; a tensor that no rule gives a name of the tower is not part of it. Names with `|`
# between them stand for parts of equal size that the checkpoint keeps in one tensor.
NameRules = Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRules:
    """What a text tower asks of the rows of token ids that it is given."""

    max_tokens: int
    """The longest row, special tokens included."""
    vocab_size: int
    """Ids are below this."""
    special_token_ids: Mapping[str, int] = field(default_factory=dict)
    """Roles (`eos`, `pad`) of tokens that the tower finds by their id."""
    pads_to_max: bool = False
    """Whether every row has `max_tokens`, because padding is seen and was seen in training."""


class PixelBackbone(nn.Module):
    """Normalized pixels float [N, 3, H, W] -> [N, width], transformers' `pooler_output`."""

    width: int
    """Channels of the output."""
    image_size: int | None
    """The only H and W that it takes; None if positions are interpolated to any."""

    def settle(self, *, height: int, width: int) -> None:
        """Compute once what depends on the weights and the images' size (pixels) alone.

        Called when the weights are there, and before anything else is done with the tower.

        Raises:
            CheckpointError: The size is of no use to the model.
        """


class TokenBackbone(nn.Module):
    """Token ids int32 [N, T], padded at the end -> [N, width], transformers' `pooler_output`."""

    width: int
    """Channels of the output."""
    token_rules: TokenRules
    """What its input must be like."""


class ImageTokens(nn.Module):
    """An image's tokens as its blocks take them.

    Weights are handed over with each call: a backbone has them under its checkpoint's names.
    """

    def forward(
        self,
        patches: Tensor,
        *,
        special: Tensor,
        positions: Tensor,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """Put special tokens first, and patches at their positions.

        Args:
            patches: Float [N, P, width].
            special: Float [S, width], the same for all images, positions included.
            positions: Float [P, width].
            norm: Of all tokens, if there is one.

        Returns:
            [N, S + P, width].
        """
        # Not `len`, which exports as a constant. Contiguous, for one fast kernel that concatenates.
        first = special.expand(patches.shape[0], -1, -1).contiguous()
        x = torch.cat([first, patches + positions], dim=1)
        return x if norm is None else norm(x)


def block_shape(config: Any) -> BlockShape:
    """The sizes of the blocks, from a config that gives them their usual names."""
    return BlockShape(
        width=config.hidden_size,
        hidden_width=config.intermediate_size,
        num_heads=config.num_attention_heads,
        act=config.hidden_act,
        norm_eps=config.layer_norm_eps,
    )


def square_size(config: Any, name: str) -> int:
    """Pixels of a square (`image_size`, `patch_size`) that a config gives as one number or two."""
    value = getattr(config, name)
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise CheckpointError(
            f"{name}={value!r} of {config.model_type}: only squares are supported"
        )
    return int(sides.pop())


def patch_embedding(config: Any, *, bias: bool) -> nn.Conv2d:
    """The convolution that makes a token of every patch."""
    if config.num_channels != 3:
        raise CheckpointError(
            f"num_channels={config.num_channels!r} of {config.model_type}: only RGB is supported"
        )
    size = square_size(config, "patch_size")
    return nn.Conv2d(3, config.hidden_size, kernel_size=size, stride=size, bias=bias)


def num_patches(config: Any) -> int:
    """Patches of an image in the size that the checkpoint was trained with."""
    return (square_size(config, "image_size") // square_size(config, "patch_size")) ** 2


def tokens(patches: Tensor) -> Tensor:
    """The output of `patch_embedding`, float [N, width, rows, columns], as [N, T, width]."""
    return patches.flatten(2).transpose(1, 2)


def require(config: Any, name: str, value: object) -> None:
    """Raise CheckpointError unless a setting of a config has the one value that is supported."""
    found = getattr(config, name)
    if found != value:
        raise CheckpointError(
            f"{name}={found!r} of {config.model_type} is not supported (supported: {value!r})"
        )
