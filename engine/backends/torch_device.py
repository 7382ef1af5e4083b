"""The CUDA card as PyTorch sees it: may an engine run there, and what its errors mean.

Knows nothing of towers.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import DeviceError, DeviceLostError, DeviceMemoryError
from engine.manifest import Precision

# Ada, the first with FP8 tensor cores.
FP8_CAPABILITY = (8, 9)


def find_device(index: int, *, precision: Precision) -> torch.device:
    """A CUDA card that can run engines of this precision; DeviceError if there is none."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise DeviceError(
            f"PyTorch {torch.__version__} sees no CUDA GPU {index}: check `nvidia-smi` and that "
            "PyTorch is built for CUDA, or run the engine on the CPU with `--backend onnxruntime`"
        )
    check_capability(torch.cuda.get_device_capability(index), precision=precision)
    return torch.device("cuda", index)


def check_capability(capability: tuple[int, int], *, precision: Precision) -> None:
    """DeviceError if a card of this compute capability cannot run engines of this precision."""
    if precision == "fp8" and capability < FP8_CAPABILITY:
        raise DeviceError(
            f"this GPU (sm_{capability[0]}{capability[1]}) has no FP8: use an fp16 engine: "
            "`clipmill engine build --precision fp16`"
        )


@contextmanager
def typed_errors(device: torch.device, *, max_rows: int | None = None) -> Iterator[None]:
    """Raise what CUDA and Triton fail with as DeviceError, DeviceMemoryError or DeviceLostError.

    Args:
        device: The card.
        max_rows: Of a batch, where the caller could choose smaller ones.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        short = ": stop what else runs on it, or use a larger card"
        if max_rows is not None:
            short = (
                f" for batches of {max_rows} rows: use smaller batches, or stop what else runs on "
                "it"
            )
        raise DeviceMemoryError(
            f"{_name(device)} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, too little"
            f"{short}"
        ) from error
    except (RuntimeError, _triton_error()) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "C compiler" in reason:
            raise DeviceError(
                f"Triton builds a launcher for each kernel and finds no C compiler ({reason}): "
                "install gcc, or name a compiler in $CC"
            ) from error
        if not isinstance(error, RuntimeError):
            raise DeviceError(
                f"{_name(device)}: Triton cannot build a kernel for it ({reason}): install a newer "
                "PyTorch, or run the engine with another --backend"
            ) from error
        if not _is_cuda_error(error):
            raise
        raise DeviceLostError(
            f"{_name(device)}: a call failed ({reason}); the process cannot use the GPU any "
            "more, start it again"
        ) from error
    except subprocess.CalledProcessError as error:
        raise DeviceError(
            f"Triton could not build a kernel's launcher ({error}): install gcc and Python's C "
            "headers (python3-dev)"
        ) from error


def _triton_error() -> type[Exception]:
    try:
        from triton.errors import TritonError
    except ImportError:  # it comes with PyTorch for CUDA only
        return RuntimeError
    error: type[Exception] = TritonError
    return error


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block, convolutions in float32 are so; by default cuDNN computes them in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _is_cuda_error(error: RuntimeError) -> bool:
    # cuBLAS and cuDNN failures come as plain RuntimeErrors that say so.
    named = ("CUDA error", "CUBLAS_STATUS", "cuDNN error", "CUDNN_STATUS", "NVRTC", "Triton Error")
    return isinstance(error, torch.AcceleratorError) or any(name in str(error) for name in named)


def _name(device: torch.device) -> str:
    return f"GPU {device.index} ({torch.cuda.get_device_name(device)})"
