"""A GPU that does nothing before it must: CUDA's runtime API over plain memory.

Work on a stream runs as late as CUDA allows, or as early, or at random, and copies really copy. Who
forgets to wait for an event, reuses a buffer too early or frees it too soon gets wrong numbers or
an error here, as on a real GPU.
"""

import ctypes
import functools
import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from cuda.bindings import runtime as real

Schedule = Literal["late", "early", "random"]
Work = Callable[[], None]
MIB = 2**20
DEFAULT_STREAM = 0


class Refused(Exception):  # noqa: N818
    """CUDA returns this error."""

    def __init__(self, name: str) -> None:
        self.error = getattr(real.cudaError_t, name)


class Event:
    """What had been enqueued on a stream when it was recorded."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.position = 0

    def happen(self) -> None:
        if self.stream is not None:
            self.stream.run_to(self.position)


class Stream:
    """Work in order, the first part of it done."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.work: list[Work] = []
        self.num_done = 0
        self.captured: list[Work] | None = None

    def __int__(self) -> int:
        return self.number

    def run_to(self, position: int) -> None:
        while self.num_done < position:
            self.work[self.num_done]()
            self.num_done += 1


class Graph:
    def __init__(self, work: list[Work]) -> None:
        self.work = work


def api(*, results: int = 0) -> Callable[[Any], Any]:
    """Make a method a call of CUDA: counted, failing when told to, with an error code first."""

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: "FakeCuda", *arguments: Any) -> tuple[Any, ...]:
            self.calls[method.__name__] += 1
            error = self.lost or self.next_failure(method.__name__)
            if error is not None and method.__name__ == "cudaStreamEndCapture":
                arguments[0].captured = None
            if error is None:
                try:
                    made = method(self, *arguments)
                except Refused as refused:
                    error = refused.error
                else:
                    values = made if results > 1 else (made,) * results
                    return (real.cudaError_t.cudaSuccess, *values)
            return (error, *(None,) * results)

        return call

    return decorate


class FakeCuda:
    """Stands for the module `cuda.bindings.runtime`."""

    cudaDeviceAttr = real.cudaDeviceAttr  # noqa: N815
    cudaEventBlockingSync = real.cudaEventBlockingSync  # noqa: N815
    cudaEventDisableTiming = real.cudaEventDisableTiming  # noqa: N815
    cudaHostAllocDefault = real.cudaHostAllocDefault  # noqa: N815
    cudaMemcpyKind = real.cudaMemcpyKind  # noqa: N815
    cudaStreamCaptureMode = real.cudaStreamCaptureMode  # noqa: N815
    cudaStreamNonBlocking = real.cudaStreamNonBlocking  # noqa: N815

    def __init__(
        self,
        *,
        schedule: Schedule = "late",
        seed: int = 0,
        capability: tuple[int, int] = (9, 0),
        total_bytes: int = 1024 * MIB,
    ) -> None:
        self.schedule = schedule
        self.capability = capability
        self.total_bytes = total_bytes
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, Stream] = {DEFAULT_STREAM: Stream(DEFAULT_STREAM)}
        self.events: set[Event] = set()
        self.graphs: set[Graph] = set()
        self.calls: Counter[str] = Counter()
        self.lost: Any = None
        self._num_streams = 0
        self._random = random.Random(seed)
        self._failures: dict[str, tuple[int, Any, bool]] = {}

    # What tests ask and tell.

    def fail(self, name: str, error: str, *, after: int = 0, forever: bool = False) -> None:
        """Let a call fail, once or forever; after errors of kernels, all calls do."""
        self._failures[name] = (after, getattr(real.cudaError_t, error), forever)

    def next_failure(self, name: str) -> Any:
        after, error, forever = self._failures.get(name, (-1, None, False))
        self._failures[name] = (after - 1, error, forever)
        if after > 0 or (after < 0 and not forever):
            return None
        if 700 <= int(error) < 730:
            self.lost = error
        return error

    def live(self) -> dict[str, int]:
        """What was made and not given back."""
        counts = {
            "memory": len(self.memory),
            "pinned": len(self.pinned),
            "streams": len(self.streams) - 1,
            "events": len(self.events),
            "graphs": len(self.graphs),
        }
        return {kind: count for kind, count in counts.items() if count}

    def is_idle(self) -> bool:
        """Whether all work is done."""
        return all(stream.num_done == len(stream.work) for stream in self.streams.values())

    def enqueue(self, stream: int, work: Work) -> None:
        """Put work on a stream; what a kernel does."""
        handle = self.streams[int(stream)]
        if handle.captured is not None:
            handle.captured.append(work)
            return
        handle.work.append(work)
        if self.schedule == "early":
            handle.run_to(len(handle.work))
        elif self.schedule == "random":
            chosen = self._random.choice(list(self.streams.values()))
            chosen.run_to(self._random.randint(chosen.num_done, len(chosen.work)))

    def used_bytes(self) -> int:
        return sum(block.nbytes for block in self.memory.values())

    def take(self, num_bytes: int) -> int:
        """Memory of the GPU; what lies in it is anything."""
        block = np.full(num_bytes, 0xA5, dtype=np.uint8)
        self.memory[block.ctypes.data] = block
        return block.ctypes.data

    def array(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Memory of the GPU; an error unless all of it was allocated and not freed."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._check_allocated(self.memory, address, num_bytes)
        return view(address, num_bytes).view(dtype).reshape(shape)

    def _check_allocated(self, blocks: dict[int, np.ndarray], address: int, num_bytes: int) -> None:
        inside = any(
            start <= address and address + num_bytes <= start + block.nbytes
            for start, block in blocks.items()
        )
        assert inside, f"{num_bytes} bytes at {address:#x} are not allocated"

    # What CUDA has.

    @api(results=1)
    def cudaDeviceGetAttribute(self, attribute: Any, device: int) -> int:  # noqa: N802
        names = real.cudaDeviceAttr
        assert device == 0
        return {
            names.cudaDevAttrComputeCapabilityMajor: self.capability[0],
            names.cudaDevAttrComputeCapabilityMinor: self.capability[1],
        }[attribute]

    @api(results=1)
    def cudaDriverGetVersion(self) -> int:  # noqa: N802
        return 13_010

    @api(results=1)
    def cudaGetDeviceCount(self) -> int:  # noqa: N802
        return 1

    @api(results=1)
    def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        assert device == 0
        major, minor = self.capability
        return SimpleNamespace(
            name=b"NVIDIA H200\0\0", major=major, minor=minor, totalGlobalMem=self.total_bytes
        )

    @api(results=2)
    def cudaMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return self.total_bytes - self.used_bytes(), self.total_bytes

    @api(results=1)
    def cudaMalloc(self, num_bytes: int) -> int:  # noqa: N802
        self._check_not_capturing()
        if num_bytes > self.total_bytes - self.used_bytes():
            raise Refused("cudaErrorMemoryAllocation")
        return self.take(num_bytes)

    @api()
    def cudaFree(self, address: int) -> None:  # noqa: N802
        for stream in self.streams.values():  # it waits for the whole GPU
            stream.run_to(len(stream.work))
        del self.memory[address]

    @api()
    def cudaMemset(self, address: int, value: int, num_bytes: int) -> None:  # noqa: N802
        target = self.array(address, np.uint8, (num_bytes,))
        self.enqueue(DEFAULT_STREAM, lambda: target.fill(value))

    @api(results=1)
    def cudaHostAlloc(self, num_bytes: int, flags: int) -> int:  # noqa: N802
        self._check_not_capturing()
        block = np.full(num_bytes, 0x5A, dtype=np.uint8)
        self.pinned[block.ctypes.data] = block
        return block.ctypes.data

    @api()
    def cudaFreeHost(self, address: int) -> None:  # noqa: N802
        del self.pinned[address]

    @api()
    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, num_bytes: int, kind: Any, stream: Any
    ) -> None:
        is_upload = kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice
        host, device = (source, target) if is_upload else (target, source)
        self._check_allocated(self.pinned, host, num_bytes)
        self._check_allocated(self.memory, device, num_bytes)

        def copy() -> None:
            self._check_allocated(self.pinned, host, num_bytes)
            self._check_allocated(self.memory, device, num_bytes)
            view(target, num_bytes)[:] = view(source, num_bytes)

        self.enqueue(stream, copy)

    @api(results=1)
    def cudaStreamCreateWithFlags(self, flags: int) -> Stream:  # noqa: N802
        assert flags == real.cudaStreamNonBlocking
        self._num_streams += 1
        stream = Stream(self._num_streams)
        self.streams[stream.number] = stream
        return stream

    @api()
    def cudaStreamDestroy(self, stream: Stream) -> None:  # noqa: N802
        del self.streams[stream.number]

    @api()
    def cudaStreamSynchronize(self, stream: Any) -> None:  # noqa: N802
        handle = self.streams[int(stream)]
        handle.run_to(len(handle.work))

    @api()
    def cudaStreamWaitEvent(self, stream: Stream, event: Event, flags: int) -> None:  # noqa: N802
        # What counts is where the event was recorded last before this call.
        awaited = Event()
        awaited.stream, awaited.position = event.stream, event.position
        self.enqueue(stream.number, awaited.happen)

    @api(results=1)
    def cudaEventCreateWithFlags(self, flags: int) -> Event:  # noqa: N802
        event = Event()
        self.events.add(event)
        return event

    @api()
    def cudaEventDestroy(self, event: Event) -> None:  # noqa: N802
        self.events.remove(event)

    @api()
    def cudaEventRecord(self, event: Event, stream: Stream) -> None:  # noqa: N802
        assert event in self.events
        event.stream, event.position = stream, len(stream.work)

    @api()
    def cudaEventSynchronize(self, event: Event) -> None:  # noqa: N802
        assert event in self.events
        event.happen()

    @api()
    def cudaStreamBeginCapture(self, stream: Stream, mode: Any) -> None:  # noqa: N802
        assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check_not_capturing()
        stream.captured = []

    @api(results=1)
    def cudaStreamEndCapture(self, stream: Stream) -> Graph:  # noqa: N802
        assert stream.captured is not None
        graph = Graph(stream.captured)
        stream.captured = None
        self.graphs.add(graph)
        return graph

    @api(results=1)
    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Graph:  # noqa: N802
        made = Graph(list(graph.work))
        self.graphs.add(made)
        return made

    @api()
    def cudaGraphDestroy(self, graph: Graph) -> None:  # noqa: N802
        self.graphs.remove(graph)

    @api()
    def cudaGraphExecDestroy(self, graph: Graph) -> None:  # noqa: N802
        self.graphs.remove(graph)
        graph.work.clear()

    @api()
    def cudaGraphLaunch(self, graph: Graph, stream: Stream) -> None:  # noqa: N802
        assert graph in self.graphs

        def run() -> None:
            assert graph in self.graphs, "a running graph was destroyed"
            for work in graph.work:
                work()

        self.enqueue(stream.number, run)

    def _check_not_capturing(self) -> None:
        if any(stream.captured is not None for stream in self.streams.values()):
            raise Refused("cudaErrorStreamCaptureUnsupported")


def view(address: int, num_bytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
