"""Times on a CUDA card: of any call, of FP8 products, of attention.

Knows nothing of towers.
"""

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from engine.backends.attention_kernel import HeadFactors, attend
from engine.quantization.fp8 import quantized

DEVICE = torch.device("cuda", 0)


def median_ms(call: Callable[[], object], *, repeats: int = 10) -> float:
    """Milliseconds on the card."""
    call()
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(second) for first, second in pairwise(events))


class Graphed:
    """A call of a tower as a CUDA graph."""

    def __init__(self, tower: Callable[[Tensor], Tensor], batch: Tensor) -> None:
        """Capture it."""
        # The graph knows only the addresses of weights and batch.
        self._tower, self._batch = tower, batch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            tower(batch)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._out = tower(batch)

    def __call__(self) -> Tensor:
        """Run it."""
        self._graph.replay()
        return self._out


def products() -> dict[str, Any]:
    """FP8 products of ViT-L/14 at batch 256: TFLOP/s, and what fast accumulation changes."""
    found: dict[str, Any] = {}
    num_rows, one = 256 * 257, torch.ones((), device=DEVICE)
    for name, inner, outer in (("qkv", 1024, 3072), ("fc1", 1024, 4096), ("fc2", 4096, 1024)):
        x = torch.randn(num_rows, inner, device=DEVICE).to(torch.float8_e4m3fn)
        weight = torch.randn(outer, inner, device=DEVICE).to(torch.float8_e4m3fn).t()
        bias = torch.randn(outer, device=DEVICE).half()

        def multiply(fast: bool, x: Tensor = x, w: Tensor = weight, b: Tensor = bias) -> Tensor:
            return torch._scaled_mm(
                x, w, scale_a=one, scale_b=one, bias=b, out_dtype=torch.half, use_fast_accum=fast
            )

        exact = x[:512].double() @ weight.double() + bias.double()
        for fast in (True, False):
            ms = median_ms(lambda fast=fast: multiply(fast))
            error = (multiply(fast)[:512].double() - exact).square().mean().sqrt() / exact.std()
            found[f"{name}, {'fast' if fast else 'slow'}"] = {
                "TFLOP/s": round(2 * num_rows * inner * outer / ms / 1e9),
                "relative error": float(f"{error:.2e}"),
            }
    return found


def attentions() -> dict[str, Any]:
    """Microseconds of a layer's attention: our kernel, and PyTorch's alone."""
    found: dict[str, Any] = {}
    for name, num_rows, length, num_heads in (
        ("L/14 images", 256, 257, 16),
        ("B/32 images", 1024, 50, 12),
        ("L/14 texts", 1024, 24, 12),
    ):
        qkv = torch.randn(num_rows * length, 3 * 64 * num_heads, device=DEVICE).half()
        split = qkv.view(num_rows, length, 3, num_heads, 64).permute(2, 0, 3, 1, 4)
        fp8 = quantized(qkv, 2.0**-6)
        factors = HeadFactors(scores=2.0**-15, mixed=2.0**-6)
        for label, call in (
            (
                "ours",
                lambda q=fp8, n=num_rows, h=num_heads, f=factors: attend(
                    q,
                    num_rows=n,
                    num_heads=h,
                    factors=f,
                    bias=None,
                    scale=2.0**-6,
                    dtype=torch.half,
                ),
            ),
            ("PyTorch's", lambda s=split: nn.functional.scaled_dot_product_attention(*s)),
        ):
            found[f"{name}, {label}"] = round(1e3 * median_ms(call), 1)
    return found
