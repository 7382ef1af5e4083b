"""Calls NVIDIA's nvJPEG: a batch of JPEGs, from this machine's memory to RGB in the card's.

Knows nothing of which images are asked for, or of what becomes of them.

nvJPEG itself, not a library above it: in one call it decodes a batch without Python in between, on
the card's JPEG engines where it has some, and interpolates colour as libjpeg does
(tests/test_gpu_decoder.py compares it with Pillow).
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DeviceError, DeviceMemoryError

# nvjpeg.h: nvjpegBackend_t, best first: the card's JPEG engines, then its other cores.
_HARDWARE, _GPU_HYBRID = 3, 2
_UPSAMPLING_WITH_INTERPOLATION = 1 << 5
_OUTPUT_RGBI = 5
# nvjpeg.h: nvjpegStatus_t. With those of an image nothing of its batch was decoded.
_ALLOCATOR_FAILURE, _ARCH_MISMATCH = 5, 7
_OF_AN_IMAGE = frozenset({3, 4, 10})  # bad, not supported, incomplete
_STATUS_NAMES = {1: "not initialized", 2: "invalid parameter", 6: "execution failed"} | {
    _ALLOCATOR_FAILURE: "out of memory",
    _ARCH_MISMATCH: "not for this card",
    8: "internal error",
    9: "not implemented",
}
_MAX_COMPONENTS = 4
# nvjpegImage_t: where the channels are, and bytes from one row of each to the next.
_TARGET = np.dtype([("channel", np.uint64, _MAX_COMPONENTS), ("pitch", np.uint64, _MAX_COMPONENTS)])


class CallFailedError(DeviceError):
    """A call failed: an image may be at fault, the library, or the card (`CheckedNvJpeg`)."""


class NvJpeg:
    """nvJPEG's decoder for batches, on the current card. One batch at a time."""

    def __init__(self) -> None:
        """Load the library.

        Raises:
            DeviceError: It is missing, or cannot use this card.
        """
        self._library = load_library()
        self._handle, self._state = ctypes.c_void_p(), ctypes.c_void_p()
        for backend in (_HARDWARE, _GPU_HYBRID):
            status = self._library.nvjpegCreateEx(
                *(backend, None, None, _UPSAMPLING_WITH_INTERPOLATION, ctypes.byref(self._handle))
            )
            if status != _ARCH_MISMATCH:
                break
        _check(status)
        status = self._library.nvjpegJpegStateCreate(self._handle, ctypes.byref(self._state))
        if status:
            self._library.nvjpegDestroy(self._handle)
        _check(status)

    def decode(
        self,
        sources: NDArray[np.int64],
        *,
        num_bytes: NDArray[np.int64],
        targets: NDArray[np.int64],
        row_bytes: NDArray[np.int64],
        stream: int,
    ) -> bool:
        """Decode a batch; False, and nothing was, if an image is none that nvJPEG decodes.

        Which one it does not tell. An image whose coded pixels end early it does not notice, and
        leaves what is missing as it was.

        Args:
            sources: [N], addresses of JPEGs, in memory of this machine that stays until the stream
                has come so far.
            num_bytes: [N], of each.
            targets: [N], addresses in the card's memory for uint8 [height, width, 3], RGB, HWC.
            row_bytes: [N], from one row there to the next.
            stream: Handle of the CUDA stream.

        Raises:
            CallFailedError: A call failed, maybe by an image. What began may still be under way on
                the stream, and this decoder is not to be used again.
            DeviceMemoryError: The card has too little free memory.
        """
        library, count = self._library, len(sources)
        # One thread of this machine: the card reads the bits, but of few images on cards without
        # engines for JPEGs.
        initialize = library.nvjpegDecodeBatchedInitialize
        _check(initialize(self._handle, self._state, count, 1, _OUTPUT_RGBI), kind=CallFailedError)
        target = np.zeros(count, dtype=_TARGET)
        target["channel"][:, 0], target["pitch"][:, 0] = targets, row_bytes
        status = library.nvjpegDecodeBatched(
            self._handle,
            self._state,
            *map(_pointer, (sources.astype(np.uint64), num_bytes.astype(np.uint64), target)),
            ctypes.c_void_p(stream),
        )
        if status in _OF_AN_IMAGE:
            return False
        # Some of an image, too: users of DALI met 2, 6 and 8 (NVIDIA/DALI#2019, #3159, #3160).
        _check(status, kind=CallFailedError)
        return True

    def close(self) -> None:
        """Free its memory, here and on the card."""
        self._library.nvjpegJpegStateDestroy(self._state)
        self._library.nvjpegDestroy(self._handle)


def load_library() -> Any:
    """The shared library; DeviceError if it is missing or damaged."""
    try:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
    except ImportError as error:
        raise DeviceError(_absent("cuda-pathfinder is missing")) from error
    try:
        path = load_nvidia_dynamic_lib("nvjpeg").abs_path
        return ctypes.CDLL(path)
    except (DynamicLibNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(_absent(reason)) from error


def _absent(reason: str) -> str:
    return f"nvJPEG cannot be loaded ({reason}): pip install 'clipmill[gpu]', or use --decode cpu"


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _check(status: int, *, kind: type[DeviceError] = DeviceError) -> None:
    if status == 0:
        return
    name = _STATUS_NAMES.get(status, "unknown")
    message = f"nvJPEG failed on this GPU (status {status}, {name})"
    if status == _ALLOCATOR_FAILURE:
        raise DeviceMemoryError(f"{message}: use smaller batches, or stop what else runs on it")
    raise kind(f"{message}; use --decode cpu")
