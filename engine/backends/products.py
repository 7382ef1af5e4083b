"""Linear layers as the matrix products that a GPU runs: FP8 with static scales, or 16 bit.

Knows nothing of what lies between products but activations.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.backends.kernels import activate
from engine.backends.product_kernel import is_faster, multiply_and_activate
from engine.backends.sum_product import SumProduct
from engine.errors import EngineError
from engine.quantization.fp8 import QuantizedLinear, QuantizedPoint
from engine.towers import QuantizationPoint

# cuBLAS multiplies FP8 matrices whose inner and outer widths are multiples of this.
FP8_WIDTH_STEP = 16


class Product(Protocol):
    """One or more linear layers of one input, side by side, as one product."""

    @property
    def input_scale(self) -> float | None:
        """Of the FP8 input; None where the input is 16 bit."""
        ...

    @property
    def factors(self) -> tuple[float, ...]:
        """What each layer's output must still be multiplied by."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply [M, in], FP8 or 16 bit -> 16 bit [M, the layers' outs]."""
        ...

    def activated(self, x: Tensor, *, act: str, scale: float | None) -> Tensor:
        """Multiply, and apply an activation named as in `engine.towers`, or `swiglu` or `none`.

        Returns:
            What the next product reads: FP8 of its `scale`, or 16 bit where that is None.
        """
        ...

    def summed(self, x: Tensor, *, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply, and add to the residual stream, 16 bit [M, out], in place where that is faster.

        Returns:
            The residual stream, and what the next norm has to add to it, if anything.
        """
        ...


class Fp8Product:
    """A product on FP8 tensor cores: `torch._scaled_mm` with a scale for each operand."""

    def __init__(
        self, layers: Sequence[QuantizedLinear], *, input_scale: float, dtype: torch.dtype
    ) -> None:
        """Join the layers; `dtype` is that of the output.

        The layers' weights differ in scale, and a product has one scale for all (one for each
        row or column is not supported on every card). It takes the smallest, and what is missing,
        a power of two for each layer, is left in `factors`: attention multiplies by constants of
        its own anyhow. Biases are divided by the same powers of two, so that nothing is rounded.

        Raises:
            EngineError: A width that cuBLAS has no FP8 kernel for.
        """
        for layer in layers:
            if any(width % FP8_WIDTH_STEP for width in layer.weight.shape):
                raise EngineError(
                    f"a linear layer of {' x '.join(map(str, layer.weight.shape))} cannot be "
                    f"multiplied in FP8 (widths must be multiples of {FP8_WIDTH_STEP}); use an "
                    "fp16 engine: `clipmill engine build --precision fp16`"
                )
        smallest = min(layer.scale for layer in layers)
        self.input_scale = input_scale
        self.factors = tuple(layer.scale / smallest for layer in layers)
        device = layers[0].weight.device
        # [out, in] in rows is the [in, out] in columns that cuBLAS wants of a second operand.
        rows = torch.cat([layer.weight.t().contiguous().view(torch.uint8) for layer in layers])
        self._weight = rows.view(layers[0].weight.dtype).t()
        self._bias = torch.cat(
            [
                _bias(layer, dtype) / factor
                for layer, factor in zip(layers, self.factors, strict=True)
            ]
        )
        self._dtype = dtype
        self._input_scale = torch.tensor(input_scale, device=device)
        self._weight_scale = torch.tensor(smallest, device=device)
        self._product_scale = input_scale * smallest

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply FP8 [M, in] -> 16 bit [M, out]."""
        # Fast accumulation keeps about 14 bits of a sum (arXiv 2412.19437); FP8 terms have 4.
        product: Tensor = torch._scaled_mm(
            x,
            self._weight,
            scale_a=self._input_scale,
            scale_b=self._weight_scale,
            bias=self._bias,
            out_dtype=self._dtype,
            use_fast_accum=True,
        )
        return product

    def activated(self, x: Tensor, *, act: str, scale: float | None) -> Tensor:
        """Multiply FP8 [M, in] and activate, in one kernel where that is faster."""
        is_plain = act == "none" and scale is None
        if is_plain or act == "swiglu" or not is_faster(x, num_columns=len(self._bias)):
            return activate(self(x), act=act, scale=scale)
        return multiply_and_activate(
            x,
            self._weight.t(),
            bias=self._bias,
            product_scale=self._product_scale,
            act=act,
            scale=scale,
        )

    def summed(self, x: Tensor, *, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply FP8 [M, in] and add to the residual stream."""
        if not is_faster(x, num_columns=len(self._bias)):
            return residual, self(x)
        with SumProduct(
            x,
            self._weight.t(),
            bias=self._bias,
            input_scale=self._input_scale,
            weight_scale=self._weight_scale,
            out=residual,
        ) as product:
            product.add()
        return residual, None


class HalfProduct:
    """A product in 16 bit, with sums in float32."""

    input_scale = None

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Join the layers."""
        self.factors = (1.0,) * len(layers)
        dtype = layers[0].weight.dtype
        self._weight = torch.cat([layer.weight for layer in layers])
        self._bias = torch.cat([_bias(layer, dtype) for layer in layers])

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply 16 bit [M, in] -> 16 bit [M, out]."""
        return functional.linear(x, self._weight, self._bias)

    def activated(self, x: Tensor, *, act: str, scale: float | None) -> Tensor:
        """Multiply 16 bit [M, in] and activate."""
        return activate(self(x), act=act, scale=scale)

    def summed(self, x: Tensor, *, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply 16 bit [M, in]; the next norm adds."""
        return residual, self(x)


def join(
    *layers: nn.Module, point: QuantizationPoint | QuantizedPoint, dtype: torch.dtype
) -> Product:
    """The product of the layers behind a point, quantized or kept together."""
    if isinstance(point, QuantizedPoint):
        return Fp8Product(
            [layer for layer in layers if isinstance(layer, QuantizedLinear)],
            input_scale=point.scale,
            dtype=dtype,
        )
    return HalfProduct([layer for layer in layers if isinstance(layer, nn.Linear)])


def _bias(layer: nn.Linear | QuantizedLinear, dtype: torch.dtype) -> Tensor:
    if layer.bias is not None:
        return layer.bias.detach()
    num_outputs = layer.weight.shape[0 if isinstance(layer, nn.Linear) else 1]
    return torch.zeros(num_outputs, dtype=dtype, device=layer.weight.device)
