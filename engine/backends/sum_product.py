"""An FP8 product that is added to what is there, by cuBLASLt, whose sums PyTorch does not offer.

Knows nothing of layers: tensors in, tensors out.

A norm then reads one stream, not two, and writes only what the next product reads. What that saved
on an H200, and what a sum in `product_kernel` did, is in `engine.backends.torch_fp8`.

Constants are those of cublasLt.h and library_types.h, the same in CUDA 12 and 13.
"""

import ctypes
import functools
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engine.errors import DeviceError
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
# So many algorithms are tried, in cuBLASLt's order, and the first is taken that is not slower than
# the fastest by more than this. (51,200 x 768 x 768 on an H200: 156, 90 and 89 us.)
_NUM_TRIED, _MAX_SLOWDOWN, _NUM_TIMED = 3, 1.25, 5


class Algorithm(ctypes.Structure):
    """How cuBLASLt would compute a product: cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("num_waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class SumProduct(ExitStack):
    """out += input_scale * weight_scale * x @ weight.T + bias, on the current CUDA card.

    A context: cuBLASLt's description of it, in columns, lasts as long.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor,
        input_scale: Tensor,
        weight_scale: Tensor,
        out: Tensor,
    ) -> None:
        """Describe it.

        Args:
            x: FP8 [M, in]; contiguous and from 256 bytes on, as all but the scales.
            weight: FP8 [out, in].
            bias: 16 bit [out].
            input_scale: float32 [], of `x`.
            weight_scale: float32 [].
            out: 16 bit [M, out], of the bias's type.

        Raises:
            DeviceError: There is no cuBLASLt.
            RuntimeError: A call failed; the message names its status, as PyTorch's do.
        """
        super().__init__()
        self._weight, self._x, self.out = weight, x, out
        (num_rows, num_terms), num_columns = x.shape, len(weight)
        self.size = f"{num_rows} x {num_terms} x {num_columns} to {out.dtype} on {out.device}"
        self._description = self._made("MatmulDesc", _COMPUTE_32F, _R_32F)
        for attribute, value in (
            (_TRANSA, ctypes.c_int32(_TRANSPOSED)),
            (_EPILOGUE, ctypes.c_uint32(_EPILOGUE_BIAS)),
            (_BIAS_POINTER, _pointer(bias)),
            (_BIAS_DATA_TYPE, ctypes.c_int32(_TYPES[bias.dtype])),
            (_A_SCALE_POINTER, _pointer(weight_scale)),
            (_B_SCALE_POINTER, _pointer(input_scale)),
            (_FAST_ACCUM, ctypes.c_int8(1)),
        ):
            _set("MatmulDesc", self._description, attribute, value)
        self._weight_layout, self._x_layout, self._out_layout = (
            self._made("MatrixLayout", _TYPES[kind], *map(ctypes.c_uint64, (height, width, height)))
            for kind, height, width in (
                (FP8, num_terms, num_columns),
                (FP8, num_terms, num_rows),
                (out.dtype, num_columns, num_rows),
            )
        )

    def add(self) -> None:
        """Multiply and add. The first time for a size, which no CUDA graph may capture, tries how.

        Raises:
            DeviceError: cuBLASLt has no algorithm for the size.
            RuntimeError: A call failed.
        """
        self.run(_algorithm(self))

    def algorithms(self) -> list[Algorithm]:
        """Those to try, without any that splits a sum; DeviceError if there are none."""
        preference = self._made("MatmulPreference")
        for attribute, value in (
            (_MAX_WORKSPACE_BYTES, ctypes.c_uint64(_WORKSPACE_BYTES)),
            (_REDUCTION_SCHEME_MASK, ctypes.c_uint32(0)),
        ):
            _set("MatmulPreference", preference, attribute, value)
        found, num_found = (Algorithm * _NUM_TRIED)(), ctypes.c_int()
        _call(
            "MatmulAlgoGetHeuristic",
            _handle(),
            self._description,
            self._weight_layout,
            self._x_layout,
            self._out_layout,
            self._out_layout,
            preference,
            _NUM_TRIED,
            found,
            ctypes.byref(num_found),
        )
        usable = [algorithm for algorithm in found[: num_found.value] if not algorithm.status]
        if not usable:
            raise DeviceError(
                f"cuBLASLt has no algorithm for FP8 products of {self.size}; use another backend"
            )
        return usable

    def run(self, algorithm: Algorithm) -> None:
        """Multiply and add, on the current stream."""
        num_bytes = algorithm.workspace_bytes
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=self.out.device)
        one, out = ctypes.byref(ctypes.c_float(1)), _pointer(self.out)
        _call(
            "Matmul",
            _handle(),
            self._description,
            one,
            _pointer(self._weight),
            self._weight_layout,
            _pointer(self._x),
            self._x_layout,
            one,
            out,
            self._out_layout,
            out,
            self._out_layout,
            ctypes.byref(algorithm.algorithm),
            _pointer(workspace),
            ctypes.c_size_t(num_bytes),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )

    def _made(self, kind: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        _call(f"{kind}Create", ctypes.byref(made), *arguments)
        self.callback(_call, f"{kind}Destroy", made)
        return made


_chosen: dict[str, Algorithm] = {}


def _algorithm(product: SumProduct) -> Algorithm:
    """That of a size; when the size is first met, algorithms are tried, on numbers that stay."""
    if product.size not in _chosen:
        before = product.out.clone()
        tried = [(_milliseconds(product, found), found) for found in product.algorithms()]
        product.out.copy_(before)
        fastest = min(milliseconds for milliseconds, _ in tried)
        _chosen[product.size] = next(
            found for milliseconds, found in tried if milliseconds <= _MAX_SLOWDOWN * fastest
        )
    return _chosen[product.size]


def _milliseconds(product: SumProduct, algorithm: Algorithm) -> float:
    """Of the fastest of a few runs; of Python's call, where the card takes less."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_NUM_TIMED + 1)]
    product.run(algorithm)
    for event in events:
        event.record()
        product.run(algorithm)
    events[-1].synchronize()
    return min(float(first.elapsed_time(second)) for first, second in pairwise(events))


def _set(kind: str, description: ctypes.c_void_p, attribute: int, value: Any) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    _call(f"{kind}SetAttribute", description, attribute, ctypes.byref(value), size)


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    status = getattr(library, f"cublasLt{name}")(*arguments)
    if status:
        named = library.cublasLtGetStatusName(status).decode()
        raise RuntimeError(f"{named} when calling cublasLt{name}")


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _handle() -> ctypes.c_void_p:
    # One of cuBLAS is one of cuBLASLt as well.
    return ctypes.c_void_p(torch.cuda.current_blas_handle())


@functools.cache
def _library() -> ctypes.CDLL:
    """The one that PyTorch has loaded, found by its name."""
    major = str(torch.version.cuda).partition(".")[0]
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{major}")
    except OSError as error:
        raise DeviceError(
            f"PyTorch has no cuBLASLt that others can call ({error}): install PyTorch from its "
            "wheels, or run the engine with another --backend"
        ) from error
    library.cublasLtGetStatusName.restype = ctypes.c_char_p
    return library
