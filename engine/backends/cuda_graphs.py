"""Runs a tower on a CUDA card, batch after batch: a CUDA graph for each shape, copies alongside.

Knows nothing of what the tower computes, nor of engines.

Batches go through slots in turn. While one is computed, the next is copied into pinned memory and
uploaded, and the one before downloaded, each on a stream of its own. A graph reads and writes
fixed addresses, so that a batch is copied on the card before and after; 256 images of 224 x 224
take 20 microseconds at 4 TB/s.
"""

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.torch_device import typed_errors
from engine.towers import Tower

# One computed, one uploaded, one downloaded or waiting to be fetched.
NUM_SLOTS = 3
# Of the process, as a graph is captured alone, and no tower's work may come to the card meanwhile.
_SUBMITTING = threading.Lock()
# A short batch is filled up to max_rows over a power of this: few graphs, each captured once.
ROWS_RATIO = 4


class CudaGraphRunner:
    """A `TowerRunner` of a tower that is on the card already. Several threads may use it."""

    def __init__(
        self,
        tower: Tower,
        *,
        row_shape: tuple[int, ...],
        dtype: torch.dtype,
        max_rows: int,
        length_step: int,
        device: torch.device,
    ) -> None:
        """Allocate buffers and capture the graph of the largest batch, so that memory suffices.

        Args:
            tower: On `device`; called with [rows, *row shape] of `dtype`.
            row_shape: The largest row; a row may be shorter in its first dimension.
            dtype: Of the tower's input.
            max_rows: Of a batch.
            length_step: See `TowerRunner`.
            device: A CUDA card.

        Raises:
            DeviceMemoryError: The largest batch does not fit.
            DeviceError: A call to the card failed.
        """
        self.max_rows = max_rows
        self.length_step = length_step
        self._tower = tower
        self._device = device
        self._row_sizes = row_sizes(max_rows)
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        largest = (max_rows, *row_shape)
        with self._on_device():
            self._pool = torch.cuda.graph_pool_handle()
            # Of another priority than nvJPEG's, which in one channel of the card could not overtake
            # a batch that is computed. Images/s decoded and encoded side by side on an H200: with
            # this alone 16,428, with 32 channels alone 18,917, with both 22,471.
            self._compute, self._upload, self._download = (
                torch.cuda.Stream(priority=-1) for _ in range(3)
            )
            with torch.cuda.stream(self._compute):
                self._input = torch.zeros(math.prod(largest), dtype=dtype, device=device)
                self._output = self._tower(self._input.view(largest))
            self._idle: SimpleQueue[_Slot] = SimpleQueue()
            for _ in range(NUM_SLOTS):
                self._idle.put(_Slot(self._input, self._output))
            self._graph(largest)
            torch.cuda.synchronize()

    def run(self, batches: Iterable[NDArray[Any] | Tensor]) -> Iterator[NDArray[np.float32]]:
        """Batches of at most `max_rows` rows -> their embeddings float32 [rows, D], in order.

        Batches are in host memory, or contiguous on the card, complete, and kept until their
        results are there.

        Raises:
            DeviceError: A call to the card failed.
        """
        pending: deque[_Slot] = deque()
        try:
            for batch in batches:
                embeddings = None
                try:
                    pending.append(self._idle.get(block=not pending))
                except Empty:
                    embeddings = self._collect(pending[0])
                    pending.rotate(-1)
                self._submit(batch, pending[-1])
                if embeddings is not None:
                    yield embeddings
            while pending:
                embeddings = self._collect(pending[0])
                self._idle.put(pending.popleft())
                yield embeddings
        finally:
            # Left early, by the caller or an error: what is in flight must end before its slot
            # is filled anew.
            with ExitStack() as given_back:
                for slot in pending:
                    given_back.callback(self._idle.put, slot)
                for slot in pending:
                    self._await(slot)

    def _submit(self, batch: NDArray[Any] | Tensor, slot: "_Slot") -> None:
        num_rows, size = len(batch), math.prod(batch.shape)
        padded = next(rows for rows in self._row_sizes if rows >= num_rows)
        slot.num_rows = num_rows
        if not isinstance(batch, Tensor):
            # Not torch.from_numpy, which warns of arrays that may not be written, as Ray's are.
            np.copyto(slot.host_input[:size].numpy(), batch.reshape(-1))
        with _SUBMITTING, self._on_device():
            graph = self._graph((padded, *batch.shape[1:]))
            if isinstance(batch, Tensor):
                source = batch.reshape(-1)
            else:
                source = slot.input[:size]
                with torch.cuda.stream(self._upload):
                    source.copy_(slot.host_input[:size], non_blocking=True)
                    slot.uploaded.record()
            with torch.cuda.stream(self._compute):
                slot.uploaded.wait()
                self._input[:size].copy_(source)
                graph.replay()
                slot.output[:num_rows].copy_(self._output[:num_rows])
                slot.computed.record()
            with torch.cuda.stream(self._download):
                slot.computed.wait()
                slot.host_output[:num_rows].copy_(slot.output[:num_rows], non_blocking=True)
                slot.downloaded.record()

    def _collect(self, slot: "_Slot") -> NDArray[np.float32]:
        self._await(slot)
        embeddings: NDArray[np.float32] = slot.host_output[: slot.num_rows].numpy().copy()
        return embeddings

    def _await(self, slot: "_Slot") -> None:
        with self._on_device():
            slot.downloaded.synchronize()

    def _graph(self, shape: tuple[int, ...]) -> torch.cuda.CUDAGraph:
        """The graph of a batch of this shape; captured when the shape is first met."""
        if shape not in self._graphs:
            x = self._input[: math.prod(shape)].view(shape)
            with torch.cuda.stream(self._compute):
                self._tower(x)  # compiles kernels and makes workspaces, which a capture may not
            graph = torch.cuda.CUDAGraph()
            # One pool: graphs run one after the other, so that all share the largest's memory.
            # Other threads may use the card meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._compute, capture_error_mode="thread_local"
            ):
                self._output[: shape[0]].copy_(self._tower(x))
            self._graphs[shape] = graph
        return self._graphs[shape]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with (
            typed_errors(self._device, max_rows=self.max_rows),
            torch.cuda.device(self._device),
            torch.inference_mode(),
        ):
            yield


class _Slot:
    """The buffers of one batch on its way, and how far it has come."""

    def __init__(self, flat_input: Tensor, output: Tensor) -> None:
        self.host_input = torch.empty_like(flat_input, device="cpu", pin_memory=True)
        self.input = torch.empty_like(flat_input)
        self.output = torch.empty_like(output)
        self.host_output = torch.empty_like(output, device="cpu", pin_memory=True)
        self.uploaded = torch.cuda.Event()
        self.computed = torch.cuda.Event()
        # Whoever waits for it sleeps, so that the core is free for decoding.
        self.downloaded = torch.cuda.Event(blocking=True)
        self.num_rows = 0


def row_sizes(max_rows: int) -> list[int]:
    """The sizes that batches are filled up to, ascending: 1, ..., `max_rows`."""
    sizes = [max_rows]
    while sizes[0] > 1:
        sizes.insert(0, -(-sizes[0] // ROWS_RATIO))
    return sizes
