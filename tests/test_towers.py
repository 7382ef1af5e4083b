"""The blocks against PyTorch's own attention and formulas written out by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from engine.errors import CheckpointError
from engine.towers import (
    ACTIVATIONS,
    MASKED,
    Attention,
    BlockShape,
    FeedForward,
    ImageTower,
    Normalize,
    PostNormBlock,
    PreNormBlock,
    TextTower,
    activation,
    token_after,
    unit_norm,
)

WIDTH, NUM_HEADS, NUM_ROWS, LENGTH = 24, 3, 2, 5
SHAPE = BlockShape(width=WIDTH, hidden_width=40, num_heads=NUM_HEADS, act="gelu", norm_eps=1e-3)


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tokens() -> Tensor:
    return torch.randn(NUM_ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))


def by_sdpa(attention: Attention, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
    def heads(linear: nn.Linear) -> Tensor:
        return linear(x).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)

    mixed = functional.scaled_dot_product_attention(
        heads(attention.query), heads(attention.key), heads(attention.value), attn_mask=mask
    )
    return attention.output(mixed.transpose(1, 2).flatten(2))


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + 1e-3).sqrt() * norm.weight + norm.bias


def feed_forward(x: Tensor, module: FeedForward) -> Tensor:
    hidden = x @ module.fc1.weight.T + module.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ module.fc2.weight.T + module.fc2.bias


@torch.inference_mode()
def test_attention_equals_scaled_dot_product_attention() -> None:
    attention = randomized(Attention(WIDTH, num_heads=NUM_HEADS))
    torch.testing.assert_close(attention(tokens()), by_sdpa(attention, tokens()))


@torch.inference_mode()
def test_bias_masks_positions() -> None:
    attention = randomized(Attention(WIDTH, num_heads=NUM_HEADS))
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    bias = torch.zeros(LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)
    masked = attention(tokens(), bias)
    torch.testing.assert_close(masked, by_sdpa(attention, tokens(), mask=seen))
    # The first token sees itself alone, so that others may be anything.
    changed = tokens()
    changed[:, 1:] += 3
    torch.testing.assert_close(attention(changed, bias)[:, 0], masked[:, 0])
    assert not torch.allclose(attention(changed)[:, 0], attention(tokens())[:, 0])


@torch.inference_mode()
def test_bias_masks_rows_apart() -> None:
    attention = randomized(Attention(WIDTH, num_heads=NUM_HEADS))
    seen = torch.tensor([[True] * 5, [True, True, True, False, False]])[:, None, None, :]
    bias = (~seen).float() * torch.finfo(torch.float32).min
    masked = attention(tokens(), bias)
    torch.testing.assert_close(masked[0], attention(tokens())[0])
    torch.testing.assert_close(masked[1:, :3], attention(tokens()[1:, :3]))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(CheckpointError, match="5 attention heads do not divide a width of 24"):
        Attention(WIDTH, num_heads=5)


@torch.inference_mode()
def test_pre_norm_block() -> None:
    block = randomized(PreNormBlock(SHAPE))
    x = tokens()
    x = x + by_sdpa(block.attention, layer_norm(x, block.norm1))
    expected = x + feed_forward(layer_norm(x, block.norm2), block.feed_forward)
    torch.testing.assert_close(block(tokens()), expected)


@torch.inference_mode()
def test_post_norm_block() -> None:
    block = randomized(PostNormBlock(SHAPE))
    x = tokens()
    x = layer_norm(x + by_sdpa(block.attention, x), block.norm1)
    expected = layer_norm(x + feed_forward(x, block.feed_forward), block.norm2)
    torch.testing.assert_close(block(tokens()), expected)


@torch.inference_mode()
@pytest.mark.parametrize("block", [PreNormBlock, PostNormBlock])
def test_token_after_blocks(block: type[PreNormBlock | PostNormBlock]) -> None:
    blocks = nn.ModuleList([randomized(block(SHAPE)), randomized(block(SHAPE))])
    x = tokens()
    bias = torch.zeros(x.shape[1], x.shape[1])
    bias[:, 1] = MASKED
    expected = blocks[1](blocks[0](x, bias), bias)
    assert x.shape[:2] == (2, 5)
    for position, rows in ((0, [0, 0]), (-1, [4, 4]), (torch.tensor([3, 1]), [3, 1])):
        found = token_after(blocks, x, bias, position=position)
        torch.testing.assert_close(found, expected[[0, 1], rows])


@torch.inference_mode()
def test_gated_feed_forward() -> None:
    module = randomized(FeedForward(WIDTH, hidden_width=40, act="swiglu"))
    gates, values = module.fc1.weight[:40], module.fc1.weight[40:]
    gate = tokens() @ gates.T + module.fc1.bias[:40]
    hidden = gate / (1 + torch.exp(-gate)) * (tokens() @ values.T + module.fc1.bias[40:])
    expected = hidden @ module.fc2.weight.T + module.fc2.bias
    torch.testing.assert_close(module(tokens()), expected)


@pytest.mark.parametrize("block", [PreNormBlock, PostNormBlock])
@torch.inference_mode()
def test_blocks_hand_the_bias_to_attention(block: type[PreNormBlock | PostNormBlock]) -> None:
    filled = randomized(block(SHAPE))
    bias = torch.zeros(LENGTH)
    bias[3:] = torch.finfo(torch.float32).min
    torch.testing.assert_close(filled(tokens(), bias)[:, :3], filled(tokens()[:, :3]))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_are_those_of_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), rtol=1e-5, atol=1e-6)


def test_unsupported_activation() -> None:
    with pytest.raises(CheckpointError, match=r"activation 'mish' is not supported \(supported: g"):
        FeedForward(WIDTH, hidden_width=40, act="mish")


@pytest.mark.parametrize("rescale_factor", [1 / 255, 1.0])
def test_normalize(rescale_factor: float) -> None:
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    values = torch.arange(256, dtype=torch.uint8)
    pixels = torch.stack([values, values.flip(0), values.roll(9)], dim=-1).view(2, 8, 16, 3)
    normalized = Normalize(mean=mean, std=std, rescale_factor=rescale_factor)(pixels)
    assert normalized.dtype == torch.float32
    assert normalized.shape == (2, 3, 8, 16)
    for channel in range(3):
        exact = (pixels[..., channel].double() * rescale_factor - mean[channel]) / std[channel]
        # Relative to the range, since the product and the sum nearly cancel about the mean.
        tolerance = 1e-6 * float(exact.abs().max())
        torch.testing.assert_close(normalized[:, channel].double(), exact, rtol=0, atol=tolerance)


def test_unit_norm() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, -0.001], [1e4, 0.0]])
    torch.testing.assert_close(unit_norm(x), torch.tensor([[0.6, 0.8], [0.0, -1.0], [1.0, 0.0]]))


@torch.inference_mode()
def test_image_tower_is_its_parts_in_order() -> None:
    normalize = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rescale_factor=1 / 255)
    projection = randomized(nn.Linear(3 * 2 * 2, 4, bias=False))
    tower = ImageTower(normalize=normalize, backbone=nn.Flatten(), projection=projection)
    pixels = torch.tensor([0, 255] * 6, dtype=torch.uint8).view(1, 2, 2, 3)
    features = (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2).flatten(1) @ projection.weight.T
    torch.testing.assert_close(tower(pixels), functional.normalize(features))


@torch.inference_mode()
def test_text_tower_is_its_parts_in_order() -> None:
    backbone = randomized(nn.EmbeddingBag(9, 6))
    projection = randomized(nn.Linear(6, 4, bias=False))
    tower = TextTower(backbone=backbone, projection=projection)
    ids = torch.tensor([[1, 2, 8], [0, 0, 3]], dtype=torch.int32)
    features = backbone.weight[ids].mean(dim=1) @ projection.weight.T
    torch.testing.assert_close(tower(ids), functional.normalize(features))
