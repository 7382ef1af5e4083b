"""The rate of large matrix products on this machine: what an encoder could reach at most, about.

Knows nothing of encoders.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch

GPU_SIZE, CPU_SIZE = 8192, 2048
NUM_CALLS = 7


def product_rate(device: str) -> dict[str, float]:
    """Rate in TFLOP/s by number type: float32 on CPUs; float16 and, where there is FP8, float8.

    Args:
        device: `cpu` or `cuda`.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if device == "cpu":
        x, y = torch.randn(CPU_SIZE, CPU_SIZE), torch.randn(CPU_SIZE, CPU_SIZE)
        return {"float32": _rate(lambda: x @ y, size=CPU_SIZE, wait=lambda: None)}
    half = torch.randn(GPU_SIZE, GPU_SIZE, device=device).half()
    rates = {"float16": _rate(lambda: half @ half, size=GPU_SIZE, wait=torch.cuda.synchronize)}
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device=device)
        left, right = half.to(torch.float8_e4m3fn), half.to(torch.float8_e4m3fn).t()

        def multiply() -> torch.Tensor:
            product: torch.Tensor = torch._scaled_mm(
                left, right, scale_a=one, scale_b=one, out_dtype=torch.half, use_fast_accum=True
            )
            return product

        rates["float8"] = _rate(multiply, size=GPU_SIZE, wait=torch.cuda.synchronize)
    return rates


def _rate(call: Callable[[], object], *, size: int, wait: Callable[[], None]) -> float:
    call()
    seconds = []
    for _ in range(NUM_CALLS):
        wait()
        started = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds) / 1e12
