"""nvJPEG without a GPU: the functions that `engine.decoding.nvjpeg` calls, over plain memory."""

import ctypes
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tests.fake_gpu import view

SUCCESS, BAD_JPEG, NOT_SUPPORTED = 0, 3, 4
HARDWARE = 3
RGBI = 5
MAX_COMPONENT = 4


class NvjpegImage(ctypes.Structure):
    """nvjpegImage_t of nvjpeg.h."""

    _fields_ = [
        ("channel", ctypes.c_void_p * MAX_COMPONENT),
        ("pitch", ctypes.c_size_t * MAX_COMPONENT),
    ]


def images_of_call(sources: Any, num_bytes: Any, *, count: int) -> list[bytes]:
    """What a call of `nvjpegDecodeBatched` is given."""
    addresses = (ctypes.c_size_t * count).from_address(sources.value)
    lengths = (ctypes.c_size_t * count).from_address(num_bytes.value)
    return [
        view(address, length).tobytes() for address, length in zip(addresses, lengths, strict=True)
    ]


class FakeNvjpeg:
    """JPEGs by Pillow, as they are stored; progressive and CMYK ones it does not support."""

    def __init__(self, *, statuses: dict[str, int] | None = None) -> None:
        self.statuses = statuses or {}
        """Function, or function and backend -> what it returns instead."""
        self.faults: dict[bytes, int] = {}
        """Image -> what a batch with it returns."""
        self.created: list[tuple[int, int]] = []
        """Backend and flags."""
        self.live: set[int] = set()
        """Handles that were made and not destroyed."""
        self.num_rows: list[int] = []
        """Of each batch that was asked for."""
        self.collided = False
        """Whether two threads called with one state at once."""
        self.most_at_once = 0
        """Calls of `nvjpegDecodeBatched`."""
        self._num_at_once = 0
        self._counting = threading.Lock()
        self._batch_rows: dict[int, int] = {}
        self._busy: dict[int, threading.Lock] = {}

    def nvjpegCreateEx(  # noqa: N802
        self, backend: int, device: Any, pinned: Any, flags: int, handle: Any
    ) -> int:
        assert device is None
        assert pinned is None
        self.created.append((backend, flags))
        status = self.statuses.get(f"nvjpegCreateEx {backend}", SUCCESS)
        return status or self._make(handle)

    def nvjpegJpegStateCreate(self, handle: Any, state: Any) -> int:  # noqa: N802
        assert handle.value in self.live
        return self._make(state)

    def nvjpegJpegStateDestroy(self, state: Any) -> int:  # noqa: N802
        self.live.remove(state.value)
        return SUCCESS

    def nvjpegDestroy(self, handle: Any) -> int:  # noqa: N802
        self.live.remove(handle.value)
        return SUCCESS

    def nvjpegDecodeBatchedInitialize(  # noqa: N802
        self, handle: Any, state: Any, batch_rows: int, max_threads: int, output: int
    ) -> int:
        assert {handle.value, state.value} <= self.live
        assert (max_threads, output) == (1, RGBI)
        self._batch_rows[state.value] = batch_rows
        return SUCCESS

    def nvjpegDecodeBatched(  # noqa: N802
        self, handle: Any, state: Any, sources: Any, num_bytes: Any, targets: Any, stream: Any
    ) -> int:
        assert {handle.value, state.value} <= self.live
        assert isinstance(stream, ctypes.c_void_p)
        with self._counted():
            return self._decode(state, sources, num_bytes, targets)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._counting:
            self._num_at_once += 1
            self.most_at_once = max(self.most_at_once, self._num_at_once)
        yield
        with self._counting:
            self._num_at_once -= 1

    def _decode(self, state: Any, sources: Any, num_bytes: Any, targets: Any) -> int:
        busy = self._busy.setdefault(state.value, threading.Lock())
        if not busy.acquire(blocking=False):
            self.collided = True
            return BAD_JPEG
        time.sleep(0.002)
        count = self._batch_rows[state.value]
        self.num_rows.append(count)
        wanted = (NvjpegImage * count).from_address(targets.value)
        images = images_of_call(sources, num_bytes, count=count)
        status = self.statuses.get("nvjpegDecodeBatched", SUCCESS)
        status = status or max((self.faults.get(image, SUCCESS) for image in images), default=0)
        status = status or max(map(_status, images), default=SUCCESS)
        if status == SUCCESS:
            for image, target in zip(images, wanted, strict=True):
                pixels = np.array(Image.open(io.BytesIO(image)).convert("RGB"))
                for row, line in enumerate(pixels):
                    place = target.channel[0] + row * target.pitch[0]
                    view(place, line.nbytes)[:] = line.reshape(-1)
        busy.release()
        return status

    def _make(self, reference: Any) -> int:
        handle = 1 + max(self.live, default=0)
        self.live.add(handle)
        reference._obj.value = handle
        return SUCCESS


def _status(encoded: bytes) -> int:
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:
        return BAD_JPEG
    is_usual = image.format == "JPEG" and image.mode != "CMYK" and not image.info.get("progressive")
    return SUCCESS if is_usual else NOT_SUPPORTED
