"""The GPU at hand: memory, streams, events and graphs, every call to CUDA checked.

Knows nothing of what runs on it.
"""

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DeviceError, DeviceLostError, DeviceMemoryError, NoGpuError

# After these, says the reference of cudaError_t, every further call of the process fails too.
_STICKY = {
    "cudaErrorAssert",
    "cudaErrorContained",
    "cudaErrorContextIsDestroyed",
    "cudaErrorECCUncorrectable",
    "cudaErrorExternalDevice",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalAddress",
    "cudaErrorIllegalInstruction",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorLaunchTimeout",
    "cudaErrorMisalignedAddress",
    "cudaErrorMpsClientTerminated",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorTensorMemoryLeak",
    "cudaErrorUnknown",
}
_UNUSABLE = {
    "cudaErrorInsufficientDriver": "its NVIDIA driver is missing or too old",
    "cudaErrorSystemDriverMismatch": "the driver's parts are of different versions; reboot",
}
# One of them is there wherever the NVIDIA driver is; the second under WSL.
_DRIVER_PATHS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
_CAPTURE_REFUSED = "cudaErrorStreamCapture"
_DEFAULT_STREAM = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU that CUDA sees."""

    name: str
    """As NVIDIA calls it."""
    architecture: str
    """As plans name it: `sm_90`."""
    num_bytes: int
    """Of its memory."""


class Device:
    """The current GPU of this process, through CUDA's runtime API.

    Addresses are integers; streams, events and graphs are CUDA's own handles, which whoever makes
    them gives back. `architecture` is the GPU's, as plans name it: `sm_90`.
    """

    def __init__(self, cuda: Any) -> None:
        """Take `cuda.bindings.runtime`; DeviceError if there is no GPU."""
        self._cuda = cuda
        self._lost: str | None = None
        attributes = cuda.cudaDeviceAttr
        major = self._call(
            "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0
        )
        minor = self._call(
            "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0
        )
        self.architecture = f"sm_{major}{minor}"

    def memory(self) -> tuple[int, int]:
        """Free and total memory, in bytes."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def cards(self) -> list[Card]:
        """All GPUs that this process may use."""
        found = []
        for number in range(int(self._call("cudaGetDeviceCount"))):
            properties = self._call("cudaGetDeviceProperties", number)
            found.append(
                Card(
                    name=properties.name.decode(errors="replace").rstrip("\0"),
                    architecture=f"sm_{properties.major}{properties.minor}",
                    num_bytes=int(properties.totalGlobalMem),
                )
            )
        return found

    def driver_cuda(self) -> str:
        """The newest CUDA that the driver runs: `13.0`."""
        version = int(self._call("cudaDriverGetVersion"))  # 1000 x major + 10 x minor
        return f"{version // 1000}.{version % 1000 // 10}"

    def allocate(self, num_bytes: int) -> int:
        """Memory on the GPU, filled with zeros; DeviceMemoryError if there is not enough."""
        address = int(self._call("cudaMalloc", num_bytes))
        try:
            self._call("cudaMemset", address, 0, num_bytes)
            self._call("cudaStreamSynchronize", _DEFAULT_STREAM)
        except DeviceError:
            self.free(address)
            raise
        return address

    def free(self, address: int) -> None:
        """Give memory of the GPU back."""
        self._release("cudaFree", address)

    def allocate_pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        """Host memory that can be copied beside other work: uint8 [num_bytes]."""
        address = int(self._call("cudaHostAlloc", num_bytes, self._cuda.cudaHostAllocDefault))
        memory: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * num_bytes).from_address(address)
        )
        return memory

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Give pinned memory back; the array must not be touched again."""
        self._release("cudaFreeHost", memory.ctypes.data)

    def create_stream(self) -> Any:
        """A stream that does not wait for the default stream."""
        return self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    def destroy_stream(self, stream: Any) -> None:
        """Give a stream back."""
        self._release("cudaStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        """Wait for all that was enqueued on a stream."""
        self._call("cudaStreamSynchronize", stream)

    def settle(self, stream: Any) -> None:
        """Wait for all on a stream before what it uses is given back; a lost GPU has none."""
        self._release("cudaStreamSynchronize", stream)

    def create_event(self) -> Any:
        """An event whose waiting thread sleeps, so that its core is free for decoding."""
        flags = self._cuda.cudaEventBlockingSync | self._cuda.cudaEventDisableTiming
        return self._call("cudaEventCreateWithFlags", flags)

    def destroy_event(self, event: Any) -> None:
        """Give an event back."""
        self._release("cudaEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        """Let an event happen once all that was enqueued on a stream so far is done."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is enqueued on a stream from now on wait for an event."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: Any) -> None:
        """Wait for an event."""
        self._call("cudaEventSynchronize", event)

    def upload(self, source: NDArray[np.uint8], address: int, stream: Any) -> None:
        """Enqueue a copy from pinned memory to the GPU."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, stream)

    def download(self, address: int, target: NDArray[np.uint8], stream: Any) -> None:
        """Enqueue a copy from the GPU to pinned memory."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, stream)

    def capture(self, enqueue: Callable[[], bool], stream: Any) -> Any | None:
        """Record what a function enqueues on a stream as a graph, instead of running it.

        Args:
            enqueue: Enqueues the work; false if it could not.
            stream: Where it does.

        Returns:
            The graph; None where this work cannot be captured, and must be enqueued each time.
        """
        # Thread-local, so that other threads of the process may go on using the GPU.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        enqueued = enqueue()
        error, captured = self._cuda.cudaStreamEndCapture(stream)
        if error.name.startswith(_CAPTURE_REFUSED):
            return None
        self._check("cudaStreamEndCapture", error)
        try:
            return self._call("cudaGraphInstantiate", captured, 0) if enqueued else None
        finally:
            self._release("cudaGraphDestroy", captured)

    def launch(self, graph: Any, stream: Any) -> None:
        """Enqueue a graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Give a graph back, once it no longer runs."""
        self._release("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._lost is not None:
            raise DeviceLostError(self._lost)
        error, *results = getattr(self._cuda, name)(*arguments)
        self._check(name, error)
        return results[0] if len(results) == 1 else results

    def _release(self, name: str, handle: Any) -> None:
        if self._lost is None:  # else all went with the GPU's context
            self._call(name, handle)

    def _check(self, name: str, error: Any) -> None:
        """The one place where results of CUDA calls are looked at."""
        if int(error) == 0:
            return
        if error.name == "cudaErrorNoDevice":
            raise NoGpuError("CUDA sees no GPU; is CUDA_VISIBLE_DEVICES empty?")
        if error.name in _UNUSABLE:
            kind = DeviceError if has_driver() else NoGpuError
            raise kind(f"no GPU can be used on this machine: {_UNUSABLE[error.name]}")
        if error.name == "cudaErrorMemoryAllocation":
            raise DeviceMemoryError(
                f"{name}: out of memory; end what else runs on the GPU, or use a plan with fewer "
                "rows at a time"
            )
        text = f"{name} failed: {error.name}"
        if error.name in _STICKY:
            self._lost = (
                f"{text}; this process can no longer use the GPU: start it anew, and see the "
                "driver's messages (dmesg) if that does not help"
            )
            raise DeviceLostError(self._lost)
        raise DeviceError(text)


def open_device() -> Device:
    """The current GPU.

    Raises:
        NoGpuError: There is none.
        DeviceError: There is one, but its driver or CUDA's Python package does not serve.
    """
    try:
        cuda = importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        kind = DeviceError if has_driver() else NoGpuError
        raise kind(f"CUDA for Python is missing ({error}): pip install 'clipmill[gpu]'") from error
    return Device(cuda)


def has_driver() -> bool:
    """Whether this machine, or container, has been given an NVIDIA driver."""
    return any(path.exists() for path in _DRIVER_PATHS)
