"""Fused towers against the towers that they were made of, on the GPU or in Triton's interpreter."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from engine.families.backbone import ImageTokens
from engine.quantization.fp8 import QuantizedPoint
from engine.quantization.units import replace, units_of
from engine.towers import MASKED, Attention, Tower
from tests.max_calibration import quantize
from tests.random_towers import (
    bert_tower,
    clip_text_tower,
    dinov2_tower,
    image_tower,
    pixels,
    siglip_tower,
    token_ids,
    vit_tower,
)
from tests.triton_device import DEVICE

from engine.backends.attention_kernel import HeadFactors  # isort: skip
from engine.backends.fused import fuse, head_scaling  # isort: skip
from engine.backends.image_tokens import JoinedTokens  # isort: skip
from engine.backends.products import Fp8Product, Product  # isort: skip

TOWERS: dict[str, Callable[[], tuple[Tower, Tensor]]] = {
    "image": lambda: (image_tower(), pixels(3)),
    "clip text": lambda: (clip_text_tower(), token_ids(3, 16)),
    "bert": lambda: (bert_tower(), token_ids(3, 16)),
}
MIXES: dict[str, Callable[[int, str], bool]] = {
    "all in 16 bit": lambda block, unit: True,
    "all in FP8": lambda block, unit: False,
    "first block kept": lambda block, unit: block == 0,
    "last block kept": lambda block, unit: block == 1,
    "qkv and fc2 kept": lambda block, unit: unit in ("qkv", "fc2"),
    "products, output and fc1 kept": lambda block, unit: unit in ("products", "output", "fc1"),
}


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


def without_rounded_probabilities(tower: Tower) -> Tower:
    for name, _ in list(tower.named_modules()):
        if name.endswith("probabilities_point"):
            replace(tower, {name: nn.Identity()})
    return tower


@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("name", list(TOWERS))
@torch.inference_mode()
def test_fused_towers_compute_what_their_blocks_did(name: str, mix: str) -> None:
    tower, batch = TOWERS[name]()
    tower, batch = tower.to(DEVICE), batch.to(DEVICE)
    reference = tower(batch)
    quantize(tower, batch, is_kept=MIXES[mix])
    has_fp8 = any(isinstance(module, QuantizedPoint) for module in tower.modules())
    assert has_fp8 == (mix != "all in 16 bit")
    expected = without_rounded_probabilities(copy.deepcopy(tower))(batch)
    fuse(tower.to_dtype(torch.float16))
    found = tower(batch)
    assert found.dtype == torch.float32
    assert units_of(tower) == []
    # A value that tips in one rounding changes all that follow, in the blocks run in 16 bit too.
    assert cosines(found, expected).min() > (0.99 if has_fp8 else 0.99999)
    error = (1 - cosines(found, reference)).mean()
    assert error < 1.3 * (1 - cosines(expected, reference)).mean() + 1e-5


@pytest.mark.parametrize("make", [vit_tower, dinov2_tower, siglip_tower])
@torch.inference_mode()
def test_fused_towers_of_other_families(make: Callable[[], Tower]) -> None:
    tower, batch = make().to(DEVICE), pixels(3).to(DEVICE)
    expected = tower(batch)
    fuse(tower.to_dtype(torch.float16))
    joins = [module for module in tower.modules() if isinstance(module, ImageTokens)]
    assert [type(join) for join in joins] == ([] if make is siglip_tower else [JoinedTokens])
    assert cosines(tower(batch), expected).min() > 0.99999


@pytest.mark.parametrize("mix", ["all in FP8", "qkv and fc2 kept", "products, output and fc1 kept"])
@pytest.mark.parametrize("name", list(TOWERS))
@torch.inference_mode()
def test_sums_in_place(name: str, mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, batch = TOWERS[name]()
    tower, batch = tower.to(DEVICE), batch.to(DEVICE)
    quantize(tower, batch, is_kept=MIXES[mix])
    fuse(tower.to_dtype(torch.float16))
    expected = tower(batch)
    sums = []

    def summed(product: Fp8Product, x: Tensor, *, residual: Tensor) -> tuple[Tensor, None]:
        sums.append(x.shape)
        return residual.add_(product(x)), None

    # As large products on Hopper do.
    monkeypatch.setattr(Fp8Product, "summed", summed)
    torch.testing.assert_close(tower(batch), expected, rtol=0, atol=0)
    # Of each of two blocks.
    assert len(sums) == (4 if mix == "all in FP8" else 2)


@torch.inference_mode()
def test_rows_do_not_depend_on_each_other() -> None:
    tower, batch = clip_text_tower().to(DEVICE), token_ids(4, 24).to(DEVICE)
    quantize(tower, batch)
    fuse(tower.to_dtype(torch.float16))
    together = tower(batch)
    torch.testing.assert_close(tower(batch), together, rtol=0, atol=0)
    for row in range(len(batch)):
        assert cosines(tower(batch[row : row + 1]), together[row : row + 1]).min() > 0.9999


@torch.inference_mode()
def test_padding_has_no_influence() -> None:
    tower, batch = bert_tower().to(DEVICE), token_ids(2, 24).to(DEVICE)
    quantize(tower, batch)
    fuse(tower.to_dtype(torch.float16))
    longer = nn.functional.pad(batch, (0, 16))
    # On a GPU, cuBLAS has other kernels for other sizes.
    assert cosines(tower(longer), tower(batch)).min() > (0.9999 if DEVICE.type == "cpu" else 0.999)


@pytest.mark.parametrize("mix", ["all in FP8", "last block kept"])
@pytest.mark.parametrize("name", list(TOWERS))
@torch.inference_mode()
def test_one_token_of_each_row_is_what_all_tokens_would_have_there(name: str, mix: str) -> None:
    tower, batch = TOWERS[name]()
    tower, batch = tower.to(DEVICE), batch.to(DEVICE)
    quantize(tower, batch, is_kept=MIXES[mix])
    fuse(tower.to_dtype(torch.float16))
    stack: Any = tower.backbone.get_submodule("blocks.0")
    x = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    future = torch.ones(20, 20, dtype=torch.bool, device=DEVICE).triu(1)
    bias = future.to(x.dtype) * MASKED
    all_tokens = stack(x.clone(), bias)
    assert all_tokens.shape == x.shape
    rows = torch.arange(3, device=DEVICE)
    for position, tokens in ((0, 0), (-1, 19), (rows * 7, rows * 7)):
        found = stack.output_at(x.clone(), bias, position=position)
        # Products of other sizes, of which a rounding may tip.
        torch.testing.assert_close(found, all_tokens[rows, tokens], rtol=0.02, atol=0.02)
        assert not torch.allclose(found, all_tokens[rows, 1], rtol=0.02, atol=0.02)


@torch.inference_mode()
def test_one_token_after_a_single_block() -> None:
    tower, batch = image_tower(), pixels(3)
    tower, batch = tower.to(DEVICE), batch.to(DEVICE)
    quantize(tower, batch)
    replace(tower, {"backbone.blocks": tower.backbone.get_submodule("blocks")[:1]})
    expected = without_rounded_probabilities(copy.deepcopy(tower))(batch)
    fuse(tower.to_dtype(torch.float16))
    assert cosines(tower(batch), expected).min() > 0.99


def product_that_left(*factors: float) -> Product:
    return cast(Product, SimpleNamespace(factors=factors))


def test_queries_keys_and_values_share_the_largest_scale() -> None:
    attention = Attention(32, num_heads=2)
    attention.query_point, attention.key_point, attention.value_point = (
        QuantizedPoint(scale) for scale in (2.0**-9, 2.0**-7, 2.0**-5)
    )
    # The product left queries half as large as they are, values an eighth; heads have a scale of
    # 1/4. So what it gives asks for 2^-7 where keys are, 2^-8 where queries or values are.
    scale, factors = head_scaling(attention, product_that_left(2.0, 1.0, 8.0))
    assert scale == 2.0**-7
    assert factors == HeadFactors(scores=0.25 * 2.0 * 2.0**-14, mixed=8.0 * 2.0**-7)


def test_a_scale_of_attention_that_is_no_power_of_two_is_left_to_the_scores() -> None:
    attention = Attention(48, num_heads=2)
    attention.query_point, attention.key_point, attention.value_point = (
        QuantizedPoint(2.0**-6) for _ in range(3)
    )
    scale, factors = head_scaling(attention, product_that_left(1.0, 1.0, 1.0))
    assert scale == 2.0**-3  # the next above 2^-6 / 24^-0.5
    assert factors == HeadFactors(scores=24**-0.5 * 2.0**-6, mixed=2.0**-3)


@pytest.mark.parametrize("name", list(TOWERS))
@torch.inference_mode()
def test_fp8_between_bfloat16(name: str) -> None:
    tower, batch = TOWERS[name]()
    tower, batch = tower.to(DEVICE), batch.to(DEVICE)
    quantize(tower, batch)
    expected = without_rounded_probabilities(copy.deepcopy(tower))(batch)
    fuse(tower.to_dtype(torch.bfloat16))
    assert cosines(tower(batch), expected).min() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(TOWERS))
@torch.inference_mode()
def test_fused_towers_in_bfloat16(name: str) -> None:
    # Triton's interpreter does not multiply bfloat16.
    tower, batch = TOWERS[name]()
    tower, batch = tower.to(DEVICE), batch.to(DEVICE)
    reference = tower(batch)
    fuse(tower.to_dtype(torch.bfloat16))
    assert cosines(tower(batch), reference).min() > 0.999
