"""Where Triton kernels run in tests: on the GPU, or on the CPU in Triton's interpreter.

To be imported before any module that defines kernels.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
if os.environ.get("REQUIRE_GPU") != "1":
    pytest.importorskip("triton", reason="triton is not installed; it comes with PyTorch for CUDA")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_convert = interpreter._convert_float
_ROUNDED = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}
_BITS = {tl.float8e4nv: torch.uint8, tl.bfloat16: torch.int16}


def _convert_rounding(x: Any, source: Any, target: Any, mode: Any) -> Any:
    # The interpreter cuts off what it should round, and loses carries; a GPU rounds to nearest.
    if source != tl.float32 or target not in _ROUNDED:
        return _convert(x, source, target, mode)
    rounded = torch.from_numpy(np.ascontiguousarray(x)).to(_ROUNDED[target])
    return rounded.view(_BITS[target]).numpy().view(f"uint{target.primitive_bitwidth}")


interpreter._convert_float = _convert_rounding
