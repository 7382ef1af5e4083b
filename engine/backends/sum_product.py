"""An FP8 product that is added to what is there, by cuBLASLt, whose sums PyTorch does not offer.

Knows nothing of layers: tensors in, tensors out.

A norm then reads one stream, not two, and writes only what the next product reads. Of 45 ms for 256
images of ViT-L/14 on an H200 that saved 1.8, and the same end in `product_kernel` 0.1.

Constants are those of cublasLt.h and library_types.h, the same in CUDA 12 and 13.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engine.quantization.fp8 import FP8

_COMPUTE_32F = 68  # cublasComputeType_t
_R_32F, _TYPES = 0, {torch.float16: 2, torch.bfloat16: 14, FP8: 28}  # cudaDataType_t
_TRANSPOSED, _EPILOGUE_BIAS = 1, 4
# cublasLtMatmulDescAttributes_t
_TRANSA, _EPILOGUE, _BIAS_POINTER, _A_SCALE_POINTER, _B_SCALE_POINTER = 3, 7, 8, 17, 18
_FAST_ACCUM, _BIAS_DATA_TYPE = 25, 26
# cublasLtMatmulPreferenceAttributes_t
_MAX_WORKSPACE_BYTES, _REDUCTION_SCHEME_MASK = 1, 3
# As PyTorch allows its own products on Hopper.
_WORKSPACE_BYTES = 32 << 20
# Of the algorithms that cuBLASLt proposes, best first by its estimate, so many are tried; the first
# is taken that is not slower than the fastest by more than this. At 51,200 x 768 x 768 the first
# took 156 us on an H200, the second 90; elsewhere the first took least energy, not always least
# time.
_NUM_TRIED, _MAX_SLOWDOWN, _NUM_TIMED = 3, 1.25, 5


class _Found(ctypes.Structure):
    """An algorithm: cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("num_waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def multiply_and_add(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    out: Tensor,
) -> None:
    """Add input_scale * weight_scale * x @ weight.T + bias to `out`.

    The first call of a size tries algorithms, and may not be captured in a CUDA graph.

    Args:
        x: FP8 [M, in], contiguous as all others, on a CUDA card of Hopper or later.
        weight: FP8 [out, in].
        bias: 16 bit [out].
        input_scale: float32 [] on the card, as the next.
        weight_scale: The other operand's.
        out: 16 bit [M, out] of the bias's type. The product is rounded to it before it is added.

    Raises:
        RuntimeError: A call to cuBLASLt failed; the message names it as PyTorch's own do.
    """
    with _Call(x, weight, bias, input_scale, weight_scale, out) as call:
        call.run(_algorithm(call, out), out)


class _Call(ExitStack):
    """A product as cuBLASLt describes it: out.T += weight @ x.T, in columns."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        input_scale: Tensor,
        weight_scale: Tensor,
        out: Tensor,
    ) -> None:
        super().__init__()
        self._operands = weight.data_ptr(), x.data_ptr()
        (num_rows, num_terms), num_columns = x.shape, len(weight)
        self.size = num_rows, num_columns, num_terms, out.dtype, out.device
        self._description = self._made("MatmulDesc", _COMPUTE_32F, _R_32F)
        for attribute, value in (
            (_TRANSA, ctypes.c_int32(_TRANSPOSED)),
            (_EPILOGUE, ctypes.c_uint32(_EPILOGUE_BIAS)),
            (_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr())),
            (_BIAS_DATA_TYPE, ctypes.c_int32(_TYPES[bias.dtype])),
            (_A_SCALE_POINTER, ctypes.c_void_p(weight_scale.data_ptr())),
            (_B_SCALE_POINTER, ctypes.c_void_p(input_scale.data_ptr())),
            (_FAST_ACCUM, ctypes.c_int8(1)),
        ):
            _set("MatmulDesc", self._description, attribute, value)
        out_type = _TYPES[out.dtype]
        self._layouts = tuple(
            self._made("MatrixLayout", kind, *map(ctypes.c_uint64, (height, width, height)))
            for kind, height, width in (
                (_TYPES[FP8], num_terms, num_columns),
                (_TYPES[FP8], num_terms, num_rows),
                (out_type, num_columns, num_rows),
                (out_type, num_columns, num_rows),
            )
        )

    def proposals(self) -> list[_Found]:
        """Algorithms that add all of a sum in one order: equal bits, whichever is taken."""
        preference = self._made("MatmulPreference")
        for attribute, value in (
            (_MAX_WORKSPACE_BYTES, ctypes.c_uint64(_WORKSPACE_BYTES)),
            (_REDUCTION_SCHEME_MASK, ctypes.c_uint32(0)),
        ):
            _set("MatmulPreference", preference, attribute, value)
        found, num_found = (_Found * _NUM_TRIED)(), ctypes.c_int()
        _call(
            "MatmulAlgoGetHeuristic",
            _handle(),
            self._description,
            *self._layouts,
            preference,
            _NUM_TRIED,
            found,
            ctypes.byref(num_found),
        )
        return found[: num_found.value]

    def run(self, algorithm: _Found, out: Tensor) -> None:
        workspace = torch.empty(algorithm.workspace_bytes, dtype=torch.uint8, device=out.device)
        weight_layout, x_layout, *out_layouts = self._layouts
        weight, x = map(ctypes.c_void_p, self._operands)
        there = ctypes.c_void_p(out.data_ptr())
        one = ctypes.c_float(1)
        _call(
            "Matmul",
            _handle(),
            self._description,
            ctypes.byref(one),
            weight,
            weight_layout,
            x,
            x_layout,
            ctypes.byref(one),
            there,
            out_layouts[0],
            there,
            out_layouts[1],
            ctypes.byref(algorithm.algorithm),
            ctypes.c_void_p(workspace.data_ptr()),
            ctypes.c_size_t(algorithm.workspace_bytes),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )

    def _made(self, kind: str, *arguments: Any) -> ctypes.c_void_p:
        return self.enter_context(_made(kind, *arguments))


_chosen: dict[tuple[Any, ...], _Found] = {}


def _algorithm(call: _Call, out: Tensor) -> _Found:
    """The algorithm of a size, tried on room of its own when the size is first met."""
    if call.size not in _chosen:
        scratch = torch.zeros_like(out)
        tried = [(_milliseconds(call, found, scratch), found) for found in call.proposals()]
        fastest = min(milliseconds for milliseconds, _ in tried)
        _chosen[call.size] = next(
            found for milliseconds, found in tried if milliseconds <= _MAX_SLOWDOWN * fastest
        )
    return _chosen[call.size]


def _milliseconds(call: _Call, algorithm: _Found, out: Tensor) -> float:
    """Of the fastest of a few runs after one."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_NUM_TIMED + 1)]
    call.run(algorithm, out)
    for event in events:
        event.record()
        call.run(algorithm, out)
    events[-1].synchronize()
    return min(float(first.elapsed_time(second)) for first, second in pairwise(events))


@contextmanager
def _made(kind: str, *arguments: Any) -> Iterator[ctypes.c_void_p]:
    made = ctypes.c_void_p()
    _call(f"{kind}Create", ctypes.byref(made), *arguments)
    try:
        yield made
    finally:
        _call(f"{kind}Destroy", made)


def _set(kind: str, what: ctypes.c_void_p, attribute: int, value: Any) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    _call(f"{kind}SetAttribute", what, attribute, ctypes.byref(value), size)


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), f"cublasLt{name}")(*arguments)
    if status:
        raise RuntimeError(f"CUBLAS_STATUS {status} of cublasLt{name}")


def _handle() -> ctypes.c_void_p:
    # One of cuBLAS is one of cuBLASLt as well.
    return ctypes.c_void_p(torch.cuda.current_blas_handle())


@functools.cache
def _library() -> ctypes.CDLL:
    """The one that PyTorch has loaded, found by its name."""
    assert torch.version.cuda is not None
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
