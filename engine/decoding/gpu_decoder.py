"""Decodes JPEGs on a CUDA card with NVIDIA nvImageCodec, and resizes them there.

Knows nothing of Parquet or of what reads the pixels.

nvImageCodec, not torchvision, because it answers for each image of a batch: torchvision raises for
all of them when one is damaged. What it cannot decode, and what ends early, Pillow gets, which is
also what judges.
"""

import io
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engine.backends.torch_device import typed_errors
from engine.decoding.early_ends import find_early_ends
from engine.decoding.resample import FILTERS, Source, resample
from engine.errors import DeviceError, DeviceMemoryError
from engine.images import ImageLimits, ImageRejected
from engine.preprocess import Preprocessing, decode_pixels

# Of one call of nvImageCodec: with more images it was slower, image for image, and what they are
# decoded to has to fit beside the engine.
_CALL_ROWS, _CALL_BYTES = 256, 2**31
# Of nvImageCodec's own: they read headers and start the card's work.
_CODEC_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A batch of images."""

    rows: NDArray[np.int64]
    """[n], ascending: which of the batch are images."""
    pixels: Tensor
    """uint8 [n, H, W, 3] of these rows, RGB, HWC, on the card, complete."""
    rejected: Mapping[int, ImageRejected]
    """Row -> why it is no usable image, of the others."""
    num_by_cpu: int
    """Rows that the card could not decode, and Pillow looked at."""
    card_seconds: float
    """For which the batch had the card's decoder for itself."""


class GpuDecoder:
    """Decodes batches on one card. Several threads may call: the card's decoder takes turns."""

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
            DeviceError: nvImageCodec or a card that it and PyTorch can use is missing, or the
                filter that the model was trained with is.
        """
        fault = _missing(preprocessing)
        if fault is not None:
            raise DeviceError(f"images cannot be decoded on the GPU: {fault}; use --decode cpu")
        self._codec = _nvimgcodec()
        self._preprocessing = preprocessing
        self._device = torch.device("cuda", device_index)
        self._by_cpu = partial(decode_pixels, preprocessing=preprocessing, limits=limits)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        with typed_errors(self._device):
            self._stream = torch.cuda.Stream(self._device)
        # Used by two threads at once, nvImageCodec waits for itself.
        self._turn = threading.Lock()
        # As many as threads that call: the memory of a stream stays with it.
        self._idle_sides: deque[_Side] = deque()
        kinds = self._codec.BackendKind
        try:
            self._decoder = self._codec.Decoder(
                device_id=device_index,
                max_num_cpu_threads=_CODEC_THREADS,
                # Its own decoders for CPUs are left out: what the card can't do, Pillow judges.
                backends=[
                    self._codec.Backend(kind)
                    for kind in (kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)
                ],
            )
        except RuntimeError as error:
            raise DeviceError(
                f"nvImageCodec cannot use this GPU ({error}); use --decode cpu"
            ) from error
        self._params = self._codec.DecodeParams(
            apply_exif_orientation=True, color_spec=self._codec.ColorSpec.SRGB
        )

    def decode(self, encoded: Sequence[bytes | memoryview]) -> Decoded:
        """Decode, turn upright, resize and crop images.

        Args:
            encoded: JPEGs that `jpeg_header.suits_gpu` lets pass; others cost more time.

        Raises:
            DeviceError: A call to the card failed.
            DeviceMemoryError: The card has too little free memory.
        """
        with typed_errors(self._device, max_rows=len(encoded)), torch.cuda.device(self._device):
            try:
                side = self._idle_sides.popleft()
            except IndexError:
                side = _Side(self._device)
            side.take(encoded)
            with torch.cuda.stream(side.stream):
                ends_early = self._ends_early(side, encoded)
            with self._turn, torch.cuda.stream(self._stream):
                started = time.perf_counter()
                rows, pixels = self._by_card(encoded)
                card_seconds = time.perf_counter() - started
            side.stream.synchronize()
            is_whole = ~ends_early.cpu().numpy()[rows]
            missing = np.setdiff1d(np.arange(len(encoded)), rows[is_whole])
            by_pillow, rejected = self._by_pillow(encoded, missing)
            if len(missing):
                rows = np.array([*rows[is_whole], *by_pillow], dtype=np.int64)
                order = rows.argsort()
                rows = rows[order]
                with torch.cuda.stream(side.stream):
                    more = [self._on_card(image)[None] for image in by_pillow.values()]
                    whole = torch.cat([pixels[self._on_card(is_whole)], *more])
                    whole = whole[self._on_card(order)]
                # Until then `pixels` are read, whose memory is another stream's.
                side.stream.synchronize()
                pixels = whole
            self._idle_sides.append(side)
        return Decoded(
            rows=rows,
            pixels=pixels,
            rejected=rejected,
            num_by_cpu=len(missing),
            card_seconds=card_seconds,
        )

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _code_stream(self, content: bytes | memoryview) -> tuple[Any, int] | None:
        """What nvImageCodec reads of it and bytes of its pixels; None where it sees no image."""
        try:
            stream = self._codec.CodeStream(np.frombuffer(content, dtype=np.uint8))
            # It reads the header when first asked.
            return stream, 3 * stream.width * stream.height
        except RuntimeError:
            return None

    def _ends_early(self, side: "_Side", encoded: Sequence[bytes | memoryview]) -> Tensor:
        """Which end early: bool [N] on the card, once the current stream is there."""
        bounds = np.cumsum([0, *map(len, encoded)])
        contents = side.staging[: bounds[-1]].to(self._device, non_blocking=True)
        return find_early_ends(contents, self._on_card(bounds))

    def _by_card(self, encoded: Sequence[bytes | memoryview]) -> tuple[NDArray[np.int64], Tensor]:
        """Rows that the card decodes, ascending, and their pixels, complete.

        All of nvImageCodec's objects are made, used and dropped here, in one thread's turn.
        """
        streams: list[Any] = [self._code_stream(content) for content in encoded]
        rows: list[int] = []
        parts: list[Tensor] = []
        for call in _calls(streams):
            images = self._images([streams[row][0] for row in call])
            try:
                sources = {
                    row: _source(image)
                    for row, image in zip(call, images, strict=True)
                    if image is not None
                }
                parts.append(
                    resample(
                        list(sources.values()),
                        preprocessing=self._preprocessing,
                        device=self._device,
                    )
                )
            finally:
                # Where they lie is free for others once they are dropped.
                self._stream.synchronize()
            rows += sources
        parts = parts or [resample([], preprocessing=self._preprocessing, device=self._device)]
        pixels = torch.cat(parts)
        self._stream.synchronize()
        return np.array(rows, dtype=np.int64), pixels

    def _on_card(self, numbers: NDArray[Any]) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)

    def _images(self, streams: Sequence[Any]) -> Sequence[Any]:
        """Decoded images, None where nvImageCodec fails."""
        try:
            images: Sequence[Any] = self._decoder.decode(
                streams, params=self._params, cuda_stream=self._stream.cuda_stream
            )
        except RuntimeError as error:  # of the call, not of an image
            raise DeviceError(f"nvImageCodec failed ({error}); use --decode cpu") from error
        return images

    def _by_pillow(
        self, encoded: Sequence[bytes | memoryview], rows: NDArray[np.int64]
    ) -> tuple[dict[int, NDArray[np.uint8]], dict[int, ImageRejected]]:
        """Row -> pixels, and row -> verdict, of what the card could not decode."""
        pixels: dict[int, NDArray[np.uint8]] = {}
        rejected: dict[int, ImageRejected] = {}
        outcomes = self._threads.map(self._judged, [encoded[row] for row in rows])
        for row, outcome in zip(rows.tolist(), outcomes, strict=True):
            if isinstance(outcome, ImageRejected):
                rejected[row] = outcome
            else:
                pixels[row] = outcome
        return pixels, rejected

    def _judged(self, encoded: bytes | memoryview) -> NDArray[np.uint8] | ImageRejected:
        try:
            return self._by_cpu(encoded)
        except ImageRejected as verdict:
            return verdict


class _Side:
    """What a batch has beside the card's decoder: a stream, and pinned memory on the way to it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.staging = torch.empty(0, dtype=torch.uint8)
        self._pins = device.type == "cuda"

    def take(self, encoded: Sequence[bytes | memoryview]) -> None:
        """Copy images to `staging`, one behind another; the stream must be done with the last."""
        num_bytes = sum(map(len, encoded))
        if num_bytes > len(self.staging):
            size = 1 << num_bytes.bit_length()
            self.staging = torch.empty(size, dtype=torch.uint8, pin_memory=self._pins)
        target, first = self.staging.numpy(), 0
        for content in encoded:
            last = first + len(content)
            target[first:last] = np.frombuffer(content, dtype=np.uint8)
            first = last


def decoding_fault(preprocessing: Preprocessing) -> str | None:
    """Why the GPU of this process cannot decode images for a model; None if it can: it is tried.

    Raises:
        DeviceError: It could, but a call to it failed.
    """
    fault = _missing(preprocessing)
    if fault is not None:
        return fault
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16)).save(encoded, "JPEG")
    try:
        decoder = GpuDecoder(preprocessing, limits=ImageLimits(), num_threads=1)
    except DeviceMemoryError:
        raise
    except DeviceError as error:
        return str(error)
    by_cpu = decoder.decode([encoded.getvalue()]).num_by_cpu
    decoder.close()
    return "nvImageCodec decodes no JPEG on it" if by_cpu else None


def _missing(preprocessing: Preprocessing) -> str | None:
    if find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None:
        return "nvImageCodec is not installed (pip install 'clipmill[gpu]')"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__}, whose kernels resize them, sees no CUDA GPU"
    if preprocessing.resample not in FILTERS:
        return (
            f"the model wants Pillow's filter {preprocessing.resample}, and only bilinear and "
            "bicubic are there"
        )
    return None


def _nvimgcodec() -> ModuleType:
    # It complains of codecs for other formats that it does not find, and of each damaged image.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    try:
        from nvidia import nvimgcodec
    except (ImportError, OSError) as error:
        raise DeviceError(
            f"nvImageCodec cannot be loaded ({error}): install it again (pip install "
            "'clipmill[gpu]'), or use --decode cpu"
        ) from error
    module: ModuleType = nvimgcodec
    return module


def _calls(streams: Sequence[tuple[Any, int] | None]) -> Iterator[list[int]]:
    """Rows that nvImageCodec gets at once: so many, and so large, that they fit."""
    rows: list[int] = []
    num_bytes = 0
    for row, stream in enumerate(streams):
        if stream is None:
            continue
        if rows and (len(rows) == _CALL_ROWS or num_bytes + stream[1] > _CALL_BYTES):
            yield rows
            rows, num_bytes = [], 0
        rows.append(row)
        num_bytes += stream[1]
    if rows:
        yield rows


def _source(image: Any) -> Source:
    buffer = image.__cuda_array_interface__
    height, width, _ = buffer["shape"]
    strides = buffer["strides"]
    return Source(
        address=buffer["data"][0],
        size=(width, height),
        row_bytes=3 * width if strides is None else strides[0],
    )
