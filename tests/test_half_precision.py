"""Towers that 16 bit can hold, and those that it cannot."""

import math

import pytest
import torch
from torch import Tensor, nn

from engine.errors import QuantizationError
from engine.quantization.half_precision import MAX_ACTIVATION, check_weights, watched_activations
from engine.towers import BlockShape, PreNormBlock

SHAPE = BlockShape(width=4, hidden_width=6, num_heads=2, act="relu", norm_eps=1e-5)
X = torch.tensor([[[1.0, -2.0, 3.0, -4.0]]])


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.blocks = nn.ModuleList([PreNormBlock(SHAPE)])

    @property
    def block(self) -> nn.Module:
        return self.backbone.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def tower() -> OneBlock:
    torch.manual_seed(0)
    return OneBlock().eval()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (math.nan, "holds values that are not finite; the checkpoint is damaged, fetch it again"),
        (-math.inf, "holds values that are not finite"),
        (
            65_520.0,
            r"its values reach 6\.55e\+04, float16 ends at 65,504: .*embed .*--precision fp32`",
        ),
        (-1e30, r"its values reach 1e\+30"),
    ],
)
def test_a_weight_beyond_16_bit_is_named(value: float, what: str) -> None:
    module = tower()
    with torch.no_grad():
        module.block.feed_forward.fc2.bias[3] = value
    with pytest.raises(
        QuantizationError, match=rf"^backbone\.blocks\.0\.feed_forward\.fc2\.bias: {what}"
    ):
        check_weights(module)


def test_weights_that_16_bit_holds() -> None:
    module = tower()
    with torch.no_grad():
        module.block.feed_forward.fc2.bias[3] = -65_504
    check_weights(module)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "factor"),
    [("norm1", 1.0), ("attention.value", 1.0), ("feed_forward.fc1", 1.0), ("norm2", math.nan)],
)
def test_an_activation_beyond_16_bit_is_named(name: str, factor: float, sign: int) -> None:
    module = tower()
    with torch.no_grad():
        module.block.get_submodule(name).bias[0] = sign * factor * 2 * MAX_ACTIVATION
    reach = "nan" if math.isnan(factor) else r"6\.5"
    with (
        pytest.raises(
            QuantizationError, match=rf"^backbone\.blocks\.0\.{name}: activations reach {reach}"
        ),
        watched_activations(module),
        torch.inference_mode(),
    ):
        module(X)


@torch.inference_mode()
def test_what_adds_up_from_layer_to_layer_is_watched() -> None:
    module = tower()
    module.block.attention.output.bias.fill_(0.6 * MAX_ACTIVATION)
    with watched_activations(module):
        module(X)
    module.block.feed_forward.fc2.bias.fill_(0.6 * MAX_ACTIVATION)
    with (
        pytest.raises(
            QuantizationError, match=r"^backbone\.blocks\.0: activations reach 3\.93e\+04, float16"
        ),
        watched_activations(module),
    ):
        module(X)


@torch.inference_mode()
def test_nothing_is_watched_afterwards() -> None:
    module = tower()
    with watched_activations(module):
        module(X)
    module.block.feed_forward.fc2.bias.fill_(math.inf)
    assert module(X).isinf().all()
