"""Decodes JPEGs on a CUDA card, and resizes them there.

Knows nothing of Parquet or of what reads the pixels.

What the card cannot decode, and what ends early, Pillow gets, which is also what judges.
"""

import ctypes
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.torch_device import typed_errors
from engine.decoding.checked_nvjpeg import WHOLE_SIDE, CheckedNvJpeg, whole_jpeg
from engine.decoding.early_ends import find_early_ends
from engine.decoding.jpeg_header import Geometry
from engine.decoding.jpegs import Jpegs, jpegs_of
from engine.decoding.resample import FILTERS, resample, upright
from engine.errors import DeviceError, DeviceMemoryError
from engine.images import ImageLimits, ImageRejected
from engine.preprocess import Preprocessing, decode_pixels

# Of one call of nvJPEG: what images are decoded to has to fit beside the engine. Each thread that
# calls has so much until it has resized them, and PyTorch keeps it for each nvJPEG apart.
_CALL_BYTES = 2**30
# Calls of nvJPEG at once: each hands its images to the card one by one. Photos of 34 kB alone,
# images/s on an H200: one call 39,840, two 45,425 to 46,641; beside an encoder two keep it busy.
_NUM_NVJPEGS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A batch of images."""

    rows: NDArray[np.int64]
    """[n], ascending: which of the batch are images."""
    pixels: Tensor
    """uint8 [n + k, H, W, 3] of these rows and then of the k images beside them, RGB, HWC, on the
    card, complete."""
    rejected: Mapping[int, ImageRejected]
    """Row -> why it is no usable image, of the others."""
    num_by_cpu: int
    """Rows that the card could not decode, and Pillow looked at."""
    card_seconds: float
    """Wall seconds in calls of nvJPEG, divided by how many of those there may be at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What one call of nvJPEG decoded."""

    rows: NDArray[np.int64]
    pixels: Tensor
    card_seconds: float


class GpuDecoder:
    """Decodes batches on one card. Several threads may call: of nvJPEG they take turns."""

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        limits: ImageLimits,
        num_threads: int,
        device_index: int = 0,
    ) -> None:
        """Load the library.

        Args:
            preprocessing: The output's size, and how to reach it.
            limits: Of images that Pillow decodes; the others must be within them.
            num_threads: For images that the card leaves to Pillow.
            device_index: Of the CUDA card.

        Raises:
            DeviceError: nvJPEG or a card that it and PyTorch can use is missing, or the filter
                that the model was trained with is.
        """
        fault = _missing(preprocessing)
        if fault is not None:
            raise DeviceError(f"images cannot be decoded on the GPU: {fault}; use --decode cpu")
        self._preprocessing = preprocessing
        self._device = torch.device("cuda", device_index)
        self._by_cpu = partial(decode_pixels, preprocessing=preprocessing, limits=limits)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._idle_nvjpegs: SimpleQueue[CheckedNvJpeg] = SimpleQueue()
        with typed_errors(self._device), torch.cuda.device(self._device):
            try:
                for _ in range(_NUM_NVJPEGS):
                    self._idle_nvjpegs.put(CheckedNvJpeg(self._device))
            except DeviceError:
                self.close()
                raise
        # As many as threads that call: the memory of a stream stays with it.
        self._idle_streams: deque[torch.cuda.Stream] = deque()

    def decode(self, jpegs: Jpegs, *, beside: NDArray[np.uint8] | None = None) -> Decoded:
        """Decode, turn upright, resize and crop images.

        Args:
            jpegs: The images.
            beside: Pixels uint8 [k, H, W, 3] of other images, RGB, HWC, C-contiguous, to go on with
                in one batch; told of by nothing but `pixels`.

        Raises:
            DeviceError: A call to the card failed.
            DeviceMemoryError: The card has too little free memory.
        """
        max_rows = len(jpegs) + (0 if beside is None else len(beside))
        with typed_errors(self._device, max_rows=max_rows), torch.cuda.device(self._device):
            try:
                stream = self._idle_streams.popleft()
            except IndexError:
                # As the encoder's (engine/backends/cuda_graphs.py).
                stream = torch.cuda.Stream(self._device, priority=-1)
            with torch.cuda.stream(stream):
                parts = list(self._by_card(jpegs, self._whole(jpegs)))
                rows = np.concatenate([part.rows for part in parts])
                missing = np.setdiff1d(np.arange(len(jpegs)), rows)
                by_pillow, rejected = self._by_pillow(jpegs, missing)
                pixels = torch.cat([part.pixels for part in parts])
                if by_pillow:
                    rows = np.array([*rows, *by_pillow], dtype=np.int64)
                    order = rows.argsort()
                    rows = rows[order]
                    more = [self._on_card(image)[None] for image in by_pillow.values()]
                    pixels = torch.cat([pixels, *more])[self._on_card(order)]
                if beside is not None:
                    others = _tensor_over(beside.reshape(-1)).to(self._device)
                    pixels = torch.cat([pixels, others.view(beside.shape)])
                stream.synchronize()
            self._idle_streams.append(stream)
        return Decoded(
            rows=rows,
            pixels=pixels,
            rejected=rejected,
            num_by_cpu=len(missing),
            card_seconds=sum(part.card_seconds for part in parts),
        )

    def close(self) -> None:
        """End the threads, and free nvJPEG's memory. No call may be under way, or follow."""
        self._threads.shutdown()
        while not self._idle_nvjpegs.empty():
            self._idle_nvjpegs.get().close()

    def _whole(self, jpegs: Jpegs) -> NDArray[np.int64]:
        """Rows that `find_early_ends` has nothing against, ascending."""
        first = int(jpegs.bounds[0, 0]) if len(jpegs) else 0
        last = int(jpegs.bounds[-1, 1]) if len(jpegs) else 0
        content = _tensor_over(jpegs.content[first:last]).to(self._device)
        bounds = self._on_card(jpegs.bounds - first)
        return np.flatnonzero(~find_early_ends(content, bounds).cpu().numpy())

    def _by_card(self, jpegs: Jpegs, rows: NDArray[np.int64]) -> Iterator["_Part"]:
        """Decode those of the rows that the card decodes, in this order."""
        num_bytes = 3 * jpegs.geometries[:, 0] * jpegs.geometries[:, 1]
        yield self._nothing(card_seconds=0.0)
        for chosen in _calls(num_bytes[rows]):
            yield from self._decodable(jpegs, rows[chosen], num_bytes)

    def _decodable(
        self, jpegs: Jpegs, rows: NDArray[np.int64], num_bytes: NDArray[np.int64]
    ) -> Iterator["_Part"]:
        """Decode those of the rows that nvJPEG takes: without the others all at once."""
        part = self._call(jpegs, rows, num_bytes)
        yield part
        if not len(part.rows) and len(rows) > 1:
            for half in np.array_split(rows, 2):
                yield from self._decodable(jpegs, half, num_bytes)

    def _call(self, jpegs: Jpegs, rows: NDArray[np.int64], num_bytes: NDArray[np.int64]) -> "_Part":
        """Decode and resize all rows; none, if nvJPEG does not take them all."""
        bounds, geometries, ends = jpegs.bounds[rows], jpegs.geometries[rows], num_bytes[rows]
        ends = ends.cumsum()
        with self._turn() as nvjpeg, torch.cuda.stream(nvjpeg.stream):
            started = time.perf_counter()
            decoded = torch.empty(int(ends[-1]), dtype=torch.uint8, device=self._device)
            targets = decoded.data_ptr() + ends - num_bytes[rows]
            is_done = nvjpeg.decode(
                jpegs.content.ctypes.data + bounds[:, 0],
                num_bytes=bounds[:, 1] - bounds[:, 0],
                targets=targets,
                row_bytes=3 * geometries[:, 0],
            )
            card_seconds = (time.perf_counter() - started) / _NUM_NVJPEGS
        if not is_done:
            return self._nothing(card_seconds=card_seconds)
        sources = upright(targets, size=geometries[:, :2], orientations=geometries[:, 2])
        pixels = resample(sources, preprocessing=self._preprocessing, device=self._device)
        # `decoded` is another stream's memory, which it may give to others from here on.
        torch.cuda.current_stream().synchronize()
        return _Part(rows=rows, pixels=pixels, card_seconds=card_seconds)

    @contextmanager
    def _turn(self) -> Iterator[CheckedNvJpeg]:
        """Wait for an nvJPEG, and have it within the block."""
        turn = self._idle_nvjpegs.get()
        try:
            yield turn
        finally:
            self._idle_nvjpegs.put(turn)

    def _nothing(self, *, card_seconds: float) -> "_Part":
        shape = (0, self._preprocessing.height, self._preprocessing.width, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, device=self._device)
        return _Part(rows=np.arange(0), pixels=pixels, card_seconds=card_seconds)

    def _on_card(self, numbers: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)

    def _by_pillow(
        self, jpegs: Jpegs, rows: NDArray[np.int64]
    ) -> tuple[dict[int, NDArray[np.uint8]], dict[int, ImageRejected]]:
        """Row -> pixels, and row -> verdict, of what the card could not decode."""
        pixels: dict[int, NDArray[np.uint8]] = {}
        rejected: dict[int, ImageRejected] = {}
        outcomes = self._threads.map(self._judged, map(jpegs.image, rows.tolist()))
        for row, outcome in zip(rows.tolist(), outcomes, strict=True):
            if isinstance(outcome, ImageRejected):
                rejected[row] = outcome
            else:
                pixels[row] = outcome
        return pixels, rejected

    def _judged(self, encoded: bytes) -> NDArray[np.uint8] | ImageRejected:
        try:
            return self._by_cpu(encoded)
        except ImageRejected as verdict:
            return verdict


def decoding_fault(preprocessing: Preprocessing) -> str | None:
    """Why the GPU of this process cannot decode images for a model; None if it can: it is tried.

    Raises:
        DeviceError: It could, but a call to it failed.
    """
    fault = _missing(preprocessing)
    if fault is not None:
        return fault
    try:
        decoder = GpuDecoder(preprocessing, limits=ImageLimits(), num_threads=1)
    except DeviceMemoryError:
        raise
    except DeviceError as error:
        return str(error)
    jpegs = jpegs_of([whole_jpeg()], geometries=[Geometry(WHOLE_SIDE, WHOLE_SIDE, 1)])
    try:
        by_cpu = decoder.decode(jpegs).num_by_cpu
    finally:
        decoder.close()
    return "nvJPEG decodes no JPEG on it" if by_cpu else None


def _missing(preprocessing: Preprocessing) -> str | None:
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__}, whose kernels resize them, sees no CUDA GPU"
    if preprocessing.resample not in FILTERS:
        return (
            f"the model wants Pillow's filter {preprocessing.resample}, and only bilinear and "
            "bicubic are there"
        )
    return None


def _calls(num_bytes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """What nvJPEG gets at once, by position: so many that what they are decoded to fits."""
    first, total = 0, 0
    for row, size in enumerate(num_bytes.tolist()):
        if row > first and total + size > _CALL_BYTES:
            yield np.arange(first, row)
            first, total = row, 0
        total += size
    if first < len(num_bytes):
        yield np.arange(first, len(num_bytes))


def _tensor_over(content: NDArray[np.uint8]) -> Tensor:
    """The same memory; PyTorch warns of arrays that may not be written, as Ray's and Arrow's."""
    memory = (ctypes.c_uint8 * len(content)).from_address(content.ctypes.data)
    return torch.from_numpy(np.ctypeslib.as_array(memory))
