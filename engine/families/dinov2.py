"""DINOv2, with and without register tokens: alone, or as the image half of a dual encoder.

Knows the shapes and tensor names of DINOv2, not where its weights lie or how they are executed.

Source: Oquab et al. 2023 (arXiv 2304.07193), registers: Darcet et al. 2023 (arXiv 2309.16588);
names and pooling as in transformers' `modeling_dinov2.py` and `modeling_dinov2_with_registers.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.errors import CheckpointError
from engine.families.backbone import (
    ImageTokens,
    NameRules,
    PixelBackbone,
    num_patches,
    patch_embedding,
    require,
    square_size,
    tokens,
)
from engine.families.vit import EMBEDDING_NAMES
from engine.towers import BlockShape, PreNormBlock, token_after

IMAGE_NAMES: NameRules = (
    *EMBEDDING_NAMES,
    (r"^embeddings\.register_tokens", "backbone.register_embedding"),
    (r"\.layer_scale(\d)\.lambda1", r".scale\1"),
    (r"\.mlp\.weights_in", ".feed_forward.fc1"),
    (r"\.mlp\.weights_out", ".feed_forward.fc2"),
    (r"\.mlp\.", ".feed_forward."),
)


class ScaledBlock(PreNormBlock):
    """A pre-norm block whose sums take what attention and feed-forward give times a vector.

    Source of this LayerScale: Touvron et al. 2021 (arXiv 2103.17239).
    """

    def __init__(self, shape: BlockShape) -> None:
        """Build from sizes."""
        super().__init__(shape)
        self.shape = shape
        self.scale1 = nn.Parameter(torch.empty(shape.width))
        self.scale2 = nn.Parameter(torch.empty(shape.width))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map float [N, T, width] to the same shape."""
        x = x + self.attention(self.norm1(x), bias) * self.scale1
        return x + self.feed_forward(self.norm2(x)) * self.scale2

    @torch.no_grad()
    def folded(self) -> PreNormBlock:
        """The same map as a block without scales, multiplied into the layers that it takes over."""
        with torch.device("meta"):
            block = PreNormBlock(self.shape)
        for name in ("norm1", "attention", "norm2", "feed_forward"):
            setattr(block, name, getattr(self, name))
        for layer, scale in (
            (self.attention.output, self.scale1),
            (self.feed_forward.fc2, self.scale2),
        ):
            layer.weight.mul_(scale[:, None])
            layer.bias.mul_(scale)
        return block


class ImageBackbone(PixelBackbone):
    """DINOv2: float [N, 3, H, W] -> [N, width], the class token; `settle` fixes H and W."""

    image_size = None

    def __init__(self, config: Any) -> None:
        """Take sizes from a `Dinov2Config` or `Dinov2WithRegistersConfig`."""
        super().__init__()
        require(config, "qkv_bias", True)
        shape = _block_shape(config)
        num_registers = getattr(config, "num_register_tokens", 0)
        self.width = shape.width
        self.patch_size = square_size(config, "patch_size")
        # So the two models differ in transformers.
        self.antialias = config.model_type == "dinov2_with_registers"
        self.patch_embedding = patch_embedding(config, bias=True)
        self.class_embedding = nn.Parameter(torch.empty(1, 1, shape.width))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + num_patches(config), shape.width))
        self.register_embedding = (
            nn.Parameter(torch.empty(1, num_registers, shape.width)) if num_registers else None
        )
        self.image_tokens = ImageTokens()
        self.blocks = nn.ModuleList(ScaledBlock(shape) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)

    @torch.no_grad()
    def settle(self, *, height: int, width: int) -> None:
        """Interpolate the positions to the images' size, and fold the blocks' scales."""
        grid = (height // self.patch_size, width // self.patch_size)
        if 0 in grid:
            raise CheckpointError(
                f"images of {height}x{width} pixels are smaller than one patch of "
                f"{self.patch_size}x{self.patch_size}"
            )
        self.position_embedding = nn.Parameter(self._positions(grid))
        for number, block in enumerate(self.blocks):
            assert isinstance(block, ScaledBlock)
            self.blocks[number] = block.folded()

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The class token's and, for (rows, columns) of patches, theirs: [1, 1 + T, width]."""
        first, table = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        side = round(table.shape[1] ** 0.5)
        if grid == (side, side):
            return self.position_embedding
        resized = functional.interpolate(
            table.unflatten(1, (side, side)).permute(0, 3, 1, 2),
            size=grid,
            mode="bicubic",
            antialias=self.antialias,
        )
        return torch.cat([first, tokens(resized)], dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalized pixels."""
        positions = self.position_embedding[0]
        special = self.class_embedding[0] + positions[:1]
        if self.register_embedding is not None:
            special = torch.cat([special, self.register_embedding[0]])
        patches = tokens(self.patch_embedding(pixels))
        x = self.image_tokens(patches, special=special, positions=positions[1:])
        return self.post_norm(token_after(self.blocks, x, position=0))


def _block_shape(config: Any) -> BlockShape:
    hidden_width = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:
        # Two thirds, as three matrices take the room of two, up to a multiple of 8.
        hidden_width = (int(hidden_width * 2 / 3) + 7) // 8 * 8
    return BlockShape(
        width=config.hidden_size,
        hidden_width=hidden_width,
        num_heads=config.num_attention_heads,
        act="swiglu" if config.use_swiglu_ffn else config.hidden_act,
        norm_eps=config.layer_norm_eps,
    )
