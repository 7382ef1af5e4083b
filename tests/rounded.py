"""Values that kernels are given, and what they have to round to.

Knows no kernel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.quantization.fp8 import FP8, quantized
from tests.triton_device import DEVICE


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def random_norm(dtype: torch.dtype, *, width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=1e-3, device=DEVICE, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(random(width, dtype=dtype, seed=1))
    norm.bias.copy_(random(width, dtype=dtype, seed=2))
    return norm


def normalized(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """In float32."""
    return functional.layer_norm(
        x.float(), x.shape[1:], norm.weight.float(), norm.bias.float(), norm.eps
    )


def assert_rounded(
    found: Tensor, exact: Tensor, *, scale: float | None, dtype: torch.dtype
) -> None:
    """What was stored is `exact` rounded; float32 in another order may tip what is nearly a tie."""
    expected = exact.to(dtype) if scale is None else quantized(exact, scale)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    differs = found.float() != expected.float()
    assert differs.float().mean() < 0.04
    # Neighbours in FP8 differ by an eighth at most, and in 16 bit by a 128th.
    rtol = 2.0**-3 if found.dtype == FP8 else 2.0**-7
    torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=2.0**-9)
