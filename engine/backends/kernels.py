"""Triton kernels between matrix products: norms and activations, FP8 rounding within.

Knows nothing of towers or checkpoints: tensors in, tensors out.

Each kernel also rounds its result to what the next product reads: FP8 where that product is FP8
(`scale` is a float), else the 16-bit type of its input (`scale` is None). The rounding is that of
`engine.quantization.fp8`: the nearest E4M3 number to x / scale, and the largest beyond the range.
Scales are powers of two, so that multiplying by 1 / scale is exact. NaN stays NaN, so that an
overflow shows in the embedding. Sums and softmax are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from engine.quantization.fp8 import FP8, FP8_MAX

_LARGEST = tl.constexpr(FP8_MAX)
_NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)
# GPUs round to FP8 by one instruction, which yields the largest number beyond the range.
_IS_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Values that one program holds: enough loads in flight without spilling registers.
VALUES_PER_PROGRAM = 4096


@triton.jit
def program_from_end() -> tl.tensor:
    """This program's number, counted from the last.

    The L2 cache still has what a product before it read and wrote last, its last rows; and the
    first rows, written last here, are what the next product reads first.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def to_fp8(x: tl.tensor) -> tl.tensor:
    """Nearest FP8 numbers to float32."""
    if _IS_INTERPRETED:
        x = tl.clamp(x, -_LARGEST, _LARGEST, propagate_nan=_NAN_STAYS)
    return x.to(tl.float8e4nv)


@triton.jit
def store(pointers: tl.tensor, x: tl.tensor, mask: tl.tensor) -> None:
    """Store float32 as the type that the pointers have."""
    if pointers.dtype.element_ty == tl.float8e4nv:
        tl.store(pointers, to_fp8(x), mask=mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def normalized(
    x: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    eps: tl.tensor,
    channels: tl.tensor,
    width: tl.constexpr,
) -> tl.tensor:
    """LayerNorm of rows of float32; beyond the width they are 0, before and after."""
    is_channel = channels < width
    mean = tl.sum(x, axis=1)[:, None] / width
    centred = tl.where(is_channel[None, :], x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / width
    weight = tl.load(weight_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    return centred * tl.rsqrt(variance + eps) * weight[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm_kernel(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    inverse_scale: tl.tensor,
    width: tl.constexpr,
    block_width: tl.constexpr,
    block_rows: tl.constexpr,
) -> None:
    """Sum x and delta, normalize; pointers that are None are left out."""
    rows = program_from_end().to(tl.int64) * block_rows + tl.arange(0, block_rows)
    channels = tl.arange(0, block_width)
    is_channel = channels < width
    offsets = rows[:, None] * width + channels[None, :]
    mask = (rows < num_rows)[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # Rounded as it is stored, so that the norm sees what later blocks see.
        x = (x + delta).to(x_ptr.dtype.element_ty)
        if sum_ptr is not None:
            tl.store(sum_ptr + offsets, x, mask=mask)
        x = x.to(tl.float32)
    y = normalized(x, weight_ptr, bias_ptr, eps, channels, width)
    if normed_ptr is not None:
        store(normed_ptr + offsets, y, mask)
    store(out_ptr + offsets, y * inverse_scale, mask)


@triton.jit
def _times_sigmoid(x: tl.tensor, u: tl.tensor, out_is_fp8: tl.constexpr) -> tl.tensor:
    """Multiply x by the sigmoid of 2 u, which is (1 + tanh(u)) / 2, of float32.

    GPUs have an instruction for tanh, where a sigmoid takes two of the same slow unit and care for
    their range. It is right to 2^-11 (PTX), so that the result is to |x| 2^-12: more than a step of
    FP8 only where the sigmoid is next to nothing.
    """
    if out_is_fp8 and not _IS_INTERPRETED:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        half = 0.5 * x
        return half * tanh + half
    return x * tl.sigmoid(2.0 * u)


@triton.jit
def activated(x: tl.tensor, act: tl.constexpr, out_is_fp8: tl.constexpr) -> tl.tensor:
    """An activation of float32, named as in `engine.towers`, or none."""
    if act == "quick_gelu":
        x = _times_sigmoid(x, 0.851 * x, out_is_fp8)
    elif act == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif act == "gelu_pytorch_tanh" or act == "gelu_new":
        # sqrt(2 / pi) = 0.7978845608028654.
        x = _times_sigmoid(x, 0.7978845608028654 * (x + 0.044715 * x * x * x), out_is_fp8)
    elif act == "silu":
        x = _times_sigmoid(x, 0.5 * x, out_is_fp8)
    elif act == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=_NAN_STAYS)
    else:
        tl.static_assert(act == "none")
    return x


@triton.jit(do_not_specialize=["num_rows"])
def _activate_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    inverse_scale: tl.tensor,
    act: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Apply `activated`, or `swiglu`."""
    out_is_fp8: tl.constexpr = out_ptr.dtype.element_ty == tl.float8e4nv
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    # The width is a constant, so that the compiler sees that it can load 16 bytes at once.
    mask = offsets < num_rows.to(tl.int64) * width
    if act == "swiglu":  # rows of gates and values, side by side
        x_ptr += offsets // width * width
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x_ptr + offsets + width, mask=mask, other=0.0).to(tl.float32)
        x = activated(x, "silu", out_is_fp8) * values
    else:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = activated(x, act, out_is_fp8)
    store(out_ptr + offsets, x * inverse_scale, mask)


def pre_norm(
    residual: Tensor,
    delta: Tensor | None,
    *,
    layer_norm: nn.LayerNorm,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, then normalize for the next product.

    Args:
        residual: 16 bit [M, width].
        delta: What to add, of the same type and shape, if anything.
        layer_norm: Its weights are of the 16-bit type too.
        scale: Of the product's FP8 input; None for 16 bit.

    Returns:
        The new residual stream, and the product's input.
    """
    summed = residual if delta is None else torch.empty_like(residual)
    out = product_input(residual, scale)
    _add_norm(
        residual,
        delta,
        layer_norm=layer_norm,
        summed=None if delta is None else summed,
        normed=None,
        out=out,
        scale=scale,
    )
    return summed, out


def post_norm(
    residual: Tensor, delta: Tensor | None, *, layer_norm: nn.LayerNorm, scale: float | None
) -> tuple[Tensor, Tensor]:
    """As `pre_norm`, but the normalized sum is the new residual stream.

    Returns:
        The new residual stream, and the product's input: one tensor where both are 16 bit.
    """
    out = product_input(residual, scale)
    normed = out if scale is None else torch.empty_like(residual)
    _add_norm(
        residual,
        delta,
        layer_norm=layer_norm,
        summed=None,
        normed=None if scale is None else normed,
        out=out,
        scale=scale,
    )
    return normed, out


def _add_norm(
    x: Tensor,
    delta: Tensor | None,
    *,
    layer_norm: nn.LayerNorm,
    summed: Tensor | None,
    normed: Tensor | None,
    out: Tensor,
    scale: float | None,
) -> None:
    num_rows, width = x.shape
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, VALUES_PER_PROGRAM // block_width)
    _add_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
        x,
        delta,
        layer_norm.weight,
        layer_norm.bias,
        summed,
        normed,
        out,
        num_rows,
        layer_norm.eps,
        inverse(scale),
        width=width,
        block_width=block_width,
        block_rows=block_rows,
        num_warps=8,
    )


def activate(x: Tensor, *, act: str, scale: float | None) -> Tensor:
    """Apply an activation, named as in `engine.towers`, or `none`, to 16 bit [M, hidden].

    `swiglu` makes [M, hidden] of [M, 2 * hidden].
    """
    if act == "none" and scale is None:
        return x
    num_rows, width = x.shape
    if act == "swiglu":
        width //= 2
    out = product_input(x[:, :width], scale)
    _activate_kernel[(triton.cdiv(out.numel(), VALUES_PER_PROGRAM),)](
        x,
        out,
        num_rows,
        inverse(scale),
        act=act,
        width=width,
        block=VALUES_PER_PROGRAM,
        num_warps=8,
    )
    return out


def product_input(x: Tensor, scale: float | None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Room for what a product reads, in the shape of `x`; `dtype` (that of `x`) if 16 bit."""
    dtype = FP8 if scale is not None else dtype or x.dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def inverse(scale: float | None) -> float:
    """What values are multiplied by before they are rounded."""
    return 1.0 if scale is None else 1 / scale
