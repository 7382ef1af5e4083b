"""The towers as nn.Modules: uint8 pixels or token ids in, unit embeddings out.

Knows the blocks that all families share, not which checkpoint they are filled from.

The products of attention are written out rather than left to a fused call, and every activation
that enters a product passes a `QuantizationPoint`, so that quantization can see and scale each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.errors import CheckpointError

# Added to the scores of masked positions. The lowest float16, so that it stays finite in 16 bit.
MASKED = -65504.0

CONVERTIBLE = (torch.float32, torch.float16, torch.bfloat16)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # Named as in transformers' `hidden_act`.
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "silu": functional.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that a config calls `name`; CheckpointError if it is not one of ours."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"activation {name!r} is not supported (supported: {known})")
    return ACTIVATIONS[name]


# Unit -> the points and the linear layers that are quantized together, by attribute.
Units = Mapping[str, tuple[Sequence[str], Sequence[str]]]


class QuantizationPoint(nn.Identity):
    """Where an activation enters a product; passes it on unchanged until the tower is quantized."""


class Attention(nn.Module):
    """Multi-head self-attention: float [N, T, width] -> float [N, T, width]."""

    UNITS: ClassVar[Units] = {
        "qkv": (("input_point",), ("query", "key", "value")),
        "products": (("query_point", "key_point", "probabilities_point", "value_point"), ()),
        "output": (("output_point",), ("output",)),
    }

    def __init__(self, width: int, *, num_heads: int) -> None:
        """Raise CheckpointError unless the heads divide the width."""
        super().__init__()
        if width % num_heads:
            raise CheckpointError(f"{num_heads} attention heads do not divide a width of {width}")
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.input_point = QuantizationPoint()  # one for query, key and value
        self.query_point = QuantizationPoint()
        self.key_point = QuantizationPoint()
        self.probabilities_point = QuantizationPoint()
        self.value_point = QuantizationPoint()
        self.output_point = QuantizationPoint()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend; `bias` (0 or `MASKED`, broadcast to [N, heads, T, T]) masks positions."""
        num_rows, length, width = x.shape
        heads = (num_rows, length, self.num_heads, width // self.num_heads)
        x = self.input_point(x)
        # Scaled and transposed before they are quantized: TensorRT fuses attention so.
        query = self.query_point((self.query(x) * self.scale).view(heads).transpose(1, 2))
        key = self.key_point(self.key(x).view(heads).permute(0, 2, 3, 1))
        value = self.value_point(self.value(x).view(heads).transpose(1, 2))
        scores = query @ key
        if bias is not None:
            scores = scores + bias
        mixed = self.probabilities_point(scores.softmax(dim=-1)) @ value
        mixed = mixed.transpose(1, 2).reshape(num_rows, length, width)
        return self.output(self.output_point(mixed))


class SwiGLU(nn.Module):
    """Gates beside values, float [..., 2 * width] -> silu(gates) * values, float [..., width].

    Source: Shazeer 2020 (arXiv 2002.05202).
    """

    def __init__(self, width: int) -> None:
        """Fix the channels of the output."""
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Gate the values."""
        gates, values = x.split(self.width, dim=-1)
        return functional.silu(gates) * values


class FeedForward(nn.Module):
    """Two linear layers about an activation: float [..., width] -> float [..., width]."""

    UNITS: ClassVar[Units] = {
        "fc1": (("fc1_point",), ("fc1",)),
        "fc2": (("fc2_point",), ("fc2",)),
    }

    def __init__(self, width: int, *, hidden_width: int, act: str) -> None:
        """Name the activation as transformers does (`hidden_act`), or `swiglu`.

        With `swiglu`, `fc1` gives twice the hidden width: the gates and the values.
        """
        super().__init__()
        is_gated = act == "swiglu"
        self.fc1 = nn.Linear(width, 2 * hidden_width if is_gated else hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)
        self.act = SwiGLU(hidden_width) if is_gated else activation(act)
        self.fc1_point = QuantizationPoint()
        self.fc2_point = QuantizationPoint()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        return self.fc2(self.fc2_point(self.act(self.fc1(self.fc1_point(x)))))


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """The sizes of one transformer block."""

    width: int
    """Channels of a token."""
    hidden_width: int
    """Channels that the second linear layer takes."""
    num_heads: int
    """Attention heads."""
    act: str
    """Activation, named as in transformers' `hidden_act`, or `swiglu`."""
    norm_eps: float
    """Added to the variance in LayerNorm."""


class Block(nn.Module):
    """What both kinds of transformer blocks share."""

    def output_at(self, x: Tensor, bias: Tensor | None = None, *, position: int | Tensor) -> Tensor:
        """One token of each row of the output, at `position` as in `token_at`."""
        return token_at(self(x, bias), position=position)


class PreNormBlock(Block):
    """A block whose LayerNorms come before attention and feed-forward (CLIP, ViT)."""

    def __init__(self, shape: BlockShape) -> None:
        """Build from sizes."""
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.attention = Attention(shape.width, num_heads=shape.num_heads)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.feed_forward = FeedForward(shape.width, hidden_width=shape.hidden_width, act=shape.act)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map float [N, T, width] to the same shape."""
        x = x + self.attention(self.norm1(x), bias)
        return x + self.feed_forward(self.norm2(x))


class PostNormBlock(Block):
    """A block whose LayerNorms come after each sum (BERT, RoBERTa)."""

    def __init__(self, shape: BlockShape) -> None:
        """Build from sizes."""
        super().__init__()
        self.attention = Attention(shape.width, num_heads=shape.num_heads)
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.feed_forward = FeedForward(shape.width, hidden_width=shape.hidden_width, act=shape.act)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.norm_eps)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map float [N, T, width] to the same shape."""
        x = self.norm1(x + self.attention(x, bias))
        return self.norm2(x + self.feed_forward(x))


def token_at(x: Tensor, *, position: int | Tensor) -> Tensor:
    """[N, T, width] -> [N, width]: the same position of all rows, or int64 [N] of each."""
    if isinstance(position, int):
        return x[:, position]
    return x.gather(1, position[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


def token_after(
    blocks: nn.ModuleList, x: Tensor, bias: Tensor | None = None, *, position: int | Tensor
) -> Tensor:
    """One token of each row after all blocks, [N, width], at `position` as in `token_at`.

    The last block may leave the others out, and blocks may overwrite `x`.
    """
    before: list[Any] = list(blocks)
    last = before.pop()
    for block in before:
        x = block(x, bias)
    output: Tensor = last.output_at(x, bias, position=position)
    return output


class Normalize(nn.Module):
    """Pixels as stored to pixels as trained: uint8 [N, H, W, 3] -> float32 [N, 3, H, W]."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, *, mean: Sequence[float], std: Sequence[float], rescale_factor: float
    ) -> None:
        """Fold (pixel * rescale_factor - mean) / std into one product and one sum."""
        super().__init__()
        std64 = torch.tensor(std, dtype=torch.float64)
        mean64 = torch.tensor(mean, dtype=torch.float64)
        self.register_buffer("scale", (rescale_factor / std64).float(), persistent=False)
        self.register_buffer("shift", (-mean64 / std64).float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalize and move the channels to the front."""
        return (pixels.float() * self.scale + self.shift).permute(0, 3, 1, 2)


class Tower(nn.Module):
    """What both towers share: float32 at both ends, and a precision of their own between."""

    backbone: nn.Module
    projection: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations between input and output: float32 or a 16-bit type."""
        return next((tensor.dtype for tensor in self.backbone.parameters()), torch.float32)

    def to_dtype(self, dtype: torch.dtype) -> Self:
        """Convert weights and activations, but not pixel normalization and the L2 norm."""
        for module in (self.backbone, self.projection):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.dtype in CONVERTIBLE:  # and not FP8 or token ids
                    tensor.data = tensor.data.to(dtype)
        return self

    def embeddings(self, features: Tensor) -> Tensor:
        """Project [N, width] and scale to unit norm: float32 [N, D]."""
        return unit_norm(self.projection(features).float())


class ImageTower(Tower):
    """uint8 pixels [N, H, W, 3] (RGB) -> float32 embeddings [N, D] of unit norm."""

    def __init__(self, *, normalize: Normalize, backbone: nn.Module, projection: nn.Module) -> None:
        """`backbone`: float [N, 3, H, W] -> [N, width]; `projection`: [N, width] -> [N, D]."""
        super().__init__()
        self.normalize = normalize
        self.backbone = backbone
        self.projection = projection

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images."""
        return self.embeddings(self.backbone(self.normalize(pixels).to(self.dtype)))


class TextTower(Tower):
    """int32 token ids [N, T], padded -> float32 embeddings [N, D] of unit norm."""

    def __init__(self, *, backbone: nn.Module, projection: nn.Module) -> None:
        """`backbone`: int32 [N, T] -> [N, width]; `projection`: [N, width] -> [N, D]."""
        super().__init__()
        self.backbone = backbone
        self.projection = projection

    def forward(self, token_ids: Tensor) -> Tensor:
        """Encode texts."""
        return self.embeddings(self.backbone(token_ids))


def unit_norm(x: Tensor) -> Tensor:
    """Divide each row of [N, D] by its L2 norm."""
    return x / x.norm(dim=-1, keepdim=True)
