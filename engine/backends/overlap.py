"""Batches through a GPU, so that the copy in, the work and the copy out of three batches overlap.

Knows nothing of what is computed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.device import Device
from engine.errors import DeviceError, DeviceMemoryError
from engine.plans.plan import Shape

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """The buffers of one batch under way."""

    number: int
    """Which of the slots."""
    host_input: NDArray[np.uint8]
    """Pinned: uint8 [input_bytes]."""
    device_input: int
    """Address of as many bytes on the GPU."""
    device_output: int
    """Address of `output_bytes` on the GPU."""
    host_output: NDArray[np.uint8]
    """Pinned: uint8 [output_bytes]."""
    uploaded: Any
    """Event: the input is on the GPU."""
    computed: Any
    """Event: the output is on the GPU."""
    downloaded: Any
    """Event: the output is in `host_output`."""


# Takes a slot whose `device_input` will hold a batch of the given shape, and returns the bytes of
# the result. Beyond the batch lie older batches, or zeros.
Compute = Callable[[Slot, Shape], int]


class Pipeline:
    """A few slots, and one stream each for uploads, work and downloads."""

    def __init__(
        self,
        device: Device,
        *,
        num_slots: int,
        input_bytes: int,
        output_bytes: int,
        resources: ExitStack,
    ) -> None:
        """Allocate the buffers.

        Args:
            device: The GPU.
            num_slots: Batches under way at once.
            input_bytes: Of the largest batch.
            output_bytes: Of the largest result.
            resources: Gives all back when it is closed.

        Raises:
            DeviceMemoryError: The GPU or the host has too little free memory.
        """
        self._device = device
        self._streams = [
            _kept(resources, device.create_stream(), device.destroy_stream) for _ in range(3)
        ]
        self._upload, self.stream, self._download = self._streams

        def pinned(num_bytes: int) -> NDArray[np.uint8]:
            return _kept(resources, device.allocate_pinned(num_bytes), device.free_pinned)

        def on_device(num_bytes: int) -> int:
            return _kept(resources, device.allocate(num_bytes), device.free)

        def event() -> Any:
            return _kept(resources, device.create_event(), device.destroy_event)

        self.slots = [
            Slot(
                number=number,
                host_input=pinned(input_bytes),
                device_input=on_device(input_bytes),
                device_output=on_device(output_bytes),
                host_output=pinned(output_bytes),
                uploaded=event(),
                computed=event(),
                downloaded=event(),
            )
            for number in range(num_slots)
        ]
        self._run_number = 0
        self._ended: str | None = None

    def run(self, batches: Iterable[NDArray[Any]], compute: Compute) -> Iterator[NDArray[np.uint8]]:
        """Take batches through the GPU.

        Args:
            batches: Of at most `input_bytes` each.
            compute: Enqueues the work on one of them.

        Yields:
            The bytes of each result, in order.

        Raises:
            DeviceError: CUDA failed, in this run or in an earlier one: what lies on the GPU can
                no longer be trusted. Or the pipeline is closed.
            RuntimeError: Before this run was through, another began, or the pipeline was closed.
        """
        if self._ended is not None:
            raise DeviceError(self._ended)
        with self._failing():
            for stream in self._streams:  # what an abandoned run has left under way
                self._device.synchronize(stream)
        self._run_number += 1
        run_number = self._run_number
        free = deque(self.slots)
        under_way: deque[tuple[Slot, int]] = deque()
        for batch in batches:
            self._check_current(run_number)
            if not free:
                slot, num_bytes = under_way.popleft()
                yield self._finish(slot, num_bytes)
                self._check_current(run_number)
                free.append(slot)
            slot = free.popleft()
            under_way.append((slot, self._start(slot, batch, compute)))
        while under_way:
            self._check_current(run_number)
            yield self._finish(*under_way.popleft())

    def close(self) -> None:
        """Wait until nothing is under way, and take no more."""
        self._ended = "this encoder is closed"
        self._run_number += 1
        for stream in self._streams:
            self._device.settle(stream)

    def _start(self, slot: Slot, batch: NDArray[Any], compute: Compute) -> int:
        """Enqueue all that is to be done with a batch; the slot is free of earlier work."""
        device = self._device
        host_input = slot.host_input[: batch.nbytes]
        np.copyto(host_input.view(batch.dtype).reshape(batch.shape), batch)
        with self._failing():
            device.upload(host_input, slot.device_input, self._upload)
            device.record(slot.uploaded, self._upload)
            device.wait(self.stream, slot.uploaded)
            num_bytes = compute(slot, batch.shape)
            device.record(slot.computed, self.stream)
            device.wait(self._download, slot.computed)
            device.download(slot.device_output, slot.host_output[:num_bytes], self._download)
            device.record(slot.downloaded, self._download)
        return num_bytes

    def _finish(self, slot: Slot, num_bytes: int) -> NDArray[np.uint8]:
        with self._failing():
            self._device.synchronize_event(slot.downloaded)
        return slot.host_output[:num_bytes].copy()

    def _check_current(self, run_number: int) -> None:
        if run_number != self._run_number:
            raise RuntimeError("another run has begun on this tower, or it was closed")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Remember that CUDA failed; a lack of memory leaves all that there is as it was."""
        try:
            yield
        except DeviceMemoryError:
            raise
        except DeviceError as error:
            self._ended = f"this encoder is of no more use, a failure has ended it: {error}"
            raise


def _kept(resources: ExitStack, made: _T, give_back: Callable[[_T], None]) -> _T:
    resources.callback(give_back, made)
    return made
