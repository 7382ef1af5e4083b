"""FP8 arithmetic as modules: what a quantized tower has in the place of its points and layers.

Knows nothing of how scales are found, nor of the hardware that multiplies FP8.

A value x is stored as the E4M3 number nearest to x / scale and stands for that number times scale
(Micikevicius et al. 2022, arXiv 2209.05433). E4M3 is a floating format: within its range the
relative error is the same everywhere, so scales are powers of two (but for that of softmax).
Division by one is exact, and every runtime quantizes alike.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Softmax outputs lie in 0..1 whatever the data. TensorRT's attention kernels expect this scale.
PROBABILITIES_SCALE = 1 / FP8_MAX
# Scales are float16 in graphs of 16 bit: its smallest normal number, below which it is coarse and
# then zero. Costs nothing above 2^-20, where FP8 at this scale becomes coarse itself.
MIN_SCALE = 2.0**-14


def power_of_two_scale(amax: float) -> float:
    """The smallest power of two, from MIN_SCALE on, times which FP8 reaches `amax` (above 0)."""
    mantissa, exponent = math.frexp(amax)
    max_mantissa, max_exponent = math.frexp(FP8_MAX)
    return max(math.ldexp(1.0, exponent - max_exponent + (mantissa > max_mantissa)), MIN_SCALE)


def quantized(x: Tensor, scale: float) -> Tensor:
    """Nearest FP8 numbers to x / scale; beyond the range the largest, of NaN NaN."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def dequantized(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What FP8 numbers stand for."""
    return (x.float() * scale).to(dtype)


class _QuantizeDequantize(torch.autograd.Function):
    """Rounds to FP8 and back; in ONNX, the pair of nodes that TensorRT makes FP8 kernels of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        return dequantized(quantized(x, scale), scale, x.dtype)

    @staticmethod
    def symbolic(graph: Any, x: Any, scale: float) -> Any:
        scale_node, zero_point = _constants(graph, scale, x.type().dtype())
        stored = graph.op("QuantizeLinear", x, scale_node, zero_point)
        return graph.op("DequantizeLinear", stored, scale_node, zero_point).setType(x.type())


class _Dequantize(torch.autograd.Function):
    """What FP8 weights stand for."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return dequantized(weight, scale, dtype)

    @staticmethod
    def symbolic(graph: Any, weight: Any, scale: float, dtype: torch.dtype) -> Any:
        scale_node, zero_point = _constants(graph, scale, dtype)
        made = graph.op("DequantizeLinear", weight, scale_node, zero_point)
        return made.setType(weight.type().with_dtype(dtype))


def _constants(graph: Any, scale: float, dtype: torch.dtype) -> tuple[Any, Any]:
    # Constants, not parameters: the exporter would merge equal parameters behind Identity nodes.
    return (
        graph.op("Constant", value_t=torch.tensor(scale, dtype=dtype)),
        graph.op("Constant", value_t=torch.zeros((), dtype=FP8)),
    )


class QuantizedPoint(nn.Module):
    """A `QuantizationPoint` that rounds what passes it to FP8."""

    def __init__(self, scale: float) -> None:
        """Fix the scale."""
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Round float [...] to what FP8 can hold."""
        rounded: Tensor = _QuantizeDequantize.apply(x, self.scale)  # type: ignore[no-untyped-call]
        return rounded


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is FP8: float [..., in] -> float [..., out]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, *, scale: float, bias: Tensor | None) -> None:
        """`weight`: float8_e4m3fn [out, in], times `scale`; `bias`: float [out]."""
        super().__init__()
        # Kept as [in, out], so that the exported graph multiplies without a transpose.
        self.register_buffer("weight", weight.t().contiguous())
        self.scale = scale
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        weight: Tensor = _Dequantize.apply(  # type: ignore[no-untyped-call]
            self.weight, self.scale, x.dtype
        )
        product = x @ weight
        return product if self.bias is None else product + self.bias
