"""Launches of a compiled tower, made once for each shape and replayed as CUDA graphs.

Knows nothing of batches or copies.
"""

import functools
from collections import OrderedDict
from typing import Any

from engine.backends.execution import LoadedTower
from engine.backends.overlap import Slot
from engine.device import Device
from engine.errors import DeviceMemoryError
from engine.plans.plan import Shape

# Kept where none is captured.
_MAX_CONTEXTS = 192


class Launches:
    """Ready-made launches, one for each slot and shape.

    NVIDIA's guide has one execution context for each CUDA graph: a context that changes its shape
    invalidates what was captured from it. They take turns on one stream, so they share the
    scratch memory.
    """

    def __init__(
        self, loaded: LoadedTower, *, memory: int, device: Device, stream: Any, max_graphs: int
    ) -> None:
        """Make none yet.

        Args:
            loaded: What is launched.
            memory: Address of its scratch memory.
            device: The GPU.
            stream: Where all is enqueued.
            max_graphs: How many are kept; 0 keeps contexts only, and captures nothing.
        """
        self._loaded = loaded
        self._memory = memory
        self._device = device
        self._stream = stream
        self._captures = max_graphs > 0
        self._max_kept = max_graphs or _MAX_CONTEXTS
        # Context, and its graph where there is one; the least recently used first.
        self._kept: OrderedDict[tuple[int, Shape], tuple[Any, Any | None]] = OrderedDict()

    def enqueue(self, slot: Slot, shape: Shape) -> None:
        """Enqueue the work on a slot's input."""
        key = (slot.number, shape)
        if key not in self._kept:
            self._make_room()
            self._kept[key] = self._first_run(slot, shape)
            return
        self._kept.move_to_end(key)
        context, graph = self._kept[key]
        if graph is None:
            self._loaded.enqueue(context, self._stream)
        else:
            self._device.launch(graph, self._stream)

    def _first_run(self, slot: Slot, shape: Shape) -> tuple[Any, Any | None]:
        context = self._loaded.context(
            shape, source=slot.device_input, target=slot.device_output, memory=self._memory
        )
        # What a context prepares at its first run must not be captured.
        self._loaded.enqueue(context, self._stream)
        if not (self._captures and self._loaded.can_capture(context, self._stream)):
            return context, None
        enqueue = functools.partial(self._loaded.enqueue_for_capture, context, self._stream)
        try:
            return context, self._device.capture(enqueue, self._stream)
        except DeviceMemoryError:
            # It runs as well without; and the context, in use, must not go.
            return context, None

    def _make_room(self) -> None:
        if len(self._kept) < self._max_kept:
            return
        self._device.synchronize(self._stream)  # it may be running
        _, (_, graph) = self._kept.popitem(last=False)
        if graph is not None:
            self._device.destroy_graph(graph)

    def clear(self) -> None:
        """Drop all; none runs any more."""
        for _, graph in self._kept.values():
            if graph is not None:
                self._device.destroy_graph(graph)
        self._kept.clear()
