"""A tower's blocks as few large steps: FP8 or 16-bit products, and the kernels between them.

Knows nothing of batches, streams or engines; runs on whatever stream is current.

A block is four products and three kernels where products end in an activation and in FP8, which
they do on Hopper but for small batches; else up to five. The residual stream has the
tower's 16-bit type, as in the exported graph; in float32 it would add a quarter to the kernels'
traffic.

Four things differ from the exported graph. Three are closer to float32 than it is: values are
rounded to FP8 straight from float32, what an activation reads is not rounded to 16 bit where a
product applies it, and softmax outputs, which never leave the multiprocessor, not to FP8. The
fourth is coarser: queries, keys and values share the largest of their scales (`head_scaling`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.backends.attention_kernel import HeadFactors, attend
from engine.backends.image_tokens import JoinedTokens
from engine.backends.kernels import activate, post_norm, pre_norm
from engine.backends.patches import NormalizedPatches, PatchProduct
from engine.backends.products import Product, join
from engine.families.backbone import ImageTokens
from engine.quantization.fp8 import QuantizedPoint
from engine.quantization.units import replace
from engine.towers import (
    ACTIVATIONS,
    Attention,
    ImageTower,
    PostNormBlock,
    PreNormBlock,
    Tower,
    token_at,
)


class FusedBlock:
    """What the stacks have in common: a block without its norms."""

    def __init__(self, block: PreNormBlock | PostNormBlock) -> None:
        """Take over weights and scales; EngineError if FP8 cannot have their sizes."""
        dtype = block.norm1.weight.dtype
        attention, feed_forward = block.attention, block.feed_forward
        self.norm1 = block.norm1
        self.norm2 = block.norm2
        self.qkv = join(
            attention.query,
            attention.key,
            attention.value,
            point=attention.input_point,
            dtype=dtype,
        )
        self.output = join(attention.output, point=attention.output_point, dtype=dtype)
        self.fc1 = join(feed_forward.fc1, point=feed_forward.fc1_point, dtype=dtype)
        self.fc2 = join(feed_forward.fc2, point=feed_forward.fc2_point, dtype=dtype)
        self._num_heads = attention.num_heads
        self._head_scale, self._head_factors = head_scaling(attention, self.qkv)
        self._dtype = dtype
        # All activations are in the table but the gated one.
        names = {function: name for name, function in ACTIVATIONS.items()}
        self._act = names.get(feed_forward.act, "swiglu")

    def mixed(
        self, x: Tensor, *, num_rows: int, bias: Tensor | None, position: int | Tensor | None
    ) -> Tensor:
        """What `qkv` reads [M, width] -> values mixed by attention, as `output` reads them.

        Of all tokens [M, width], or of those at a position [num_rows, width].
        """
        num_queries = position + 1 if isinstance(position, int) and position >= 0 else None
        mixed = attend(
            self.qkv.activated(x, act="none", scale=self._head_scale),
            num_rows=num_rows,
            num_heads=self._num_heads,
            factors=self._head_factors,
            bias=bias,
            scale=self.output.input_scale,
            dtype=self._dtype,
            num_queries=num_queries,
        )
        return _tokens_at(mixed, position, num_rows=num_rows)

    def feed_forward(self, x: Tensor, *, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `fc1` reads [M, width], added to the residual stream as by `Product.summed`."""
        hidden = self.fc1.activated(x, act=self._act, scale=self.fc2.input_scale)
        return self.fc2.summed(hidden, residual=residual)


class FusedStack(nn.Module, ABC):
    """All blocks of a tower; in its place in the backbone, it acts as a single block."""

    def __init__(self, blocks: Iterable[PreNormBlock] | Iterable[PostNormBlock]) -> None:
        """Take over the blocks' weights."""
        super().__init__()
        self._blocks = [FusedBlock(block) for block in blocks]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map 16 bit [N, T, width] to the same shape. What was in `x` may be overwritten."""
        return self._output(x, bias, None).view(x.shape)

    def output_at(self, x: Tensor, bias: Tensor | None = None, *, position: int | Tensor) -> Tensor:
        """Map 16 bit [N, T, width] to [N, width]: one token of each row, as in `token_at`.

        What the last block does after its attention, it does for these tokens alone. What was in
        `x` may be overwritten.
        """
        return self._output(x, bias, position)

    @abstractmethod
    def _output(self, x: Tensor, bias: Tensor | None, position: int | Tensor | None) -> Tensor:
        """Of all tokens [N * T, width], or of those at a position [N, width]."""

    def _steps(
        self, position: int | Tensor | None
    ) -> Iterator[tuple[FusedBlock, int | Tensor | None]]:
        """Each block, and the position of the tokens to go on with after its attention."""
        for block in self._blocks:
            yield block, position if block is self._blocks[-1] else None


class PreNormStack(FusedStack):
    """Of a pre-norm tower."""

    def _output(self, x: Tensor, bias: Tensor | None, position: int | Tensor | None) -> Tensor:
        residual = x.reshape(-1, x.shape[-1])
        delta = None
        for block, wanted in self._steps(position):
            residual, normed = pre_norm(
                residual, delta, layer_norm=block.norm1, scale=block.qkv.input_scale
            )
            mixed = block.mixed(normed, num_rows=len(x), bias=bias, position=wanted)
            residual = _tokens_at(residual, wanted, num_rows=len(x))
            residual, delta = block.output.summed(mixed, residual=residual)
            residual, normed = pre_norm(
                residual, delta, layer_norm=block.norm2, scale=block.fc1.input_scale
            )
            residual, delta = block.feed_forward(normed, residual=residual)
        return residual if delta is None else residual + delta


class PostNormStack(FusedStack):
    """Of a post-norm tower."""

    def _output(self, x: Tensor, bias: Tensor | None, position: int | Tensor | None) -> Tensor:
        residual = x.reshape(-1, x.shape[-1])
        # The scale under which each block's second norm writes: that of the next block's input.
        scales = [block.qkv.input_scale for block in self._blocks]
        normed = activate(residual, act="none", scale=scales[0])
        next_scales = [*scales[1:], None]
        for (block, wanted), next_scale in zip(self._steps(position), next_scales, strict=True):
            mixed = block.mixed(normed, num_rows=len(x), bias=bias, position=wanted)
            residual = _tokens_at(residual, wanted, num_rows=len(x))
            residual, delta = block.output.summed(mixed, residual=residual)
            residual, normed = post_norm(
                residual, delta, layer_norm=block.norm1, scale=block.fc1.input_scale
            )
            residual, delta = block.feed_forward(normed, residual=residual)
            residual, normed = post_norm(residual, delta, layer_norm=block.norm2, scale=next_scale)
        return residual


def _tokens_at(x: Tensor, position: int | Tensor | None, *, num_rows: int) -> Tensor:
    """Of tokens [num_rows * T, width] those at a position, as in `token_at`; all if it is None."""
    if position is None:
        return x
    # As bytes, since not all of PyTorch knows FP8.
    tokens = x.view(torch.uint8).view(num_rows, -1, x.shape[1] * x.itemsize)
    return token_at(tokens, position=position).contiguous().view(x.dtype)


@torch.no_grad()
def fuse(tower: Tower) -> None:
    """Replace a tower's modules, which are on the card already, by fewer that do all they did.

    Its blocks become one stack, its patch embedding a product, an image's tokens one kernel.

    Raises:
        EngineError: FP8 cannot have the tower's widths.
    """
    if isinstance(tower, ImageTower):
        embedding: Any = tower.backbone.get_submodule("patch_embedding")
        normalize = NormalizedPatches(
            tower.normalize, patch_size=embedding.kernel_size[0], dtype=tower.dtype
        )
        replace(
            tower, {"normalize": normalize, "backbone.patch_embedding": PatchProduct(embedding)}
        )
        joins = [n for n, module in tower.named_modules() if isinstance(module, ImageTokens)]
        replace(tower, {name: JoinedTokens() for name in joins})
    blocks: list[Any] = list(tower.backbone.get_submodule("blocks").children())
    stack = PreNormStack if isinstance(blocks[0], PreNormBlock) else PostNormStack
    replace(tower, {"backbone.blocks": nn.ModuleList([stack(blocks)])})


def head_scaling(attention: Attention, qkv: Product) -> tuple[float | None, HeadFactors]:
    """The scale of FP8 queries, keys and values, None for 16 bit; and what is left to be done.

    Each of the three is what `qkv` gives times a factor that it left, queries times attention's own
    scale, too. As one product's output they share a scale: the largest of those that their points
    ask for, up to a power of two. Where it is 2^n times a point's own, numbers below 2^(n - 15) of
    the largest have fewer bits, which matters from an n of about 10; in CLIP ViT-B/16 n is 0 or 1.
    """
    query, key, value = qkv.factors
    query *= attention.scale
    scales = [
        point.scale
        for point in (attention.query_point, attention.key_point, attention.value_point)
        if isinstance(point, QuantizedPoint)
    ]
    if not scales:
        return None, HeadFactors(scores=query * key, mixed=value)
    largest = max(scale / factor for scale, factor in zip(scales, (query, key, value), strict=True))
    shared = 2.0 ** math.ceil(math.log2(largest))
    return shared, HeadFactors(scores=query * key * shared**2, mixed=value * shared)
