"""Decodes JPEGs on a CUDA card with NVIDIA nvImageCodec, and resizes them there.

Knows nothing of Parquet or of what reads the pixels.

nvImageCodec, not torchvision, because it answers for each image of a batch: torchvision raises for
all of them when one is damaged. What it cannot decode, Pillow gets, which is also what judges.
"""

import io
import os
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


class GpuDecoder:
    """Decodes batches on one card. One thread at a time."""

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
            encoded: JPEGs that `jpeg_header.suits_gpu` lets pass and that do not end early: of one
                that does, the card leaves the rest as it was in its memory. Others cost more time.

        Raises:
            DeviceError: A call to the card failed.
            DeviceMemoryError: The card has too little free memory.
        """
        streams = [self._code_stream(content) for content in encoded]
        found: list[int] = []
        parts: list[Tensor] = []
        with (
            typed_errors(self._device, max_rows=len(encoded)),
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
        ):
            for rows in _calls(streams):
                images = self._images([streams[row] for row in rows])
                try:
                    whole = [
                        (row, _source(image))
                        for row, image in zip(rows, images, strict=True)
                        if image is not None
                    ]
                    sources = [source for _, source in whole]
                    parts.append(
                        resample(sources, preprocessing=self._preprocessing, device=self._device)
                    )
                finally:
                    # Where they lie is free for others once they are dropped.
                    self._stream.synchronize()
                found += [row for row, _ in whole]
            by_pillow, rejected = self._by_pillow(encoded, set(range(len(encoded))) - set(found))
            found += by_pillow
            parts += [torch.from_numpy(by_pillow[row])[None].to(self._device) for row in by_pillow]
            numbers = np.array(found, dtype=np.int64)
            order = numbers.argsort()
            pixels = resample([], preprocessing=self._preprocessing, device=self._device)
            if parts:
                pixels = torch.cat(parts)
            if by_pillow:
                pixels = pixels[torch.from_numpy(order).to(self._device)]
            self._stream.synchronize()
        num_by_cpu = len(by_pillow) + len(rejected)
        return Decoded(rows=numbers[order], pixels=pixels, rejected=rejected, num_by_cpu=num_by_cpu)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _code_stream(self, content: bytes | memoryview) -> Any:
        """What nvImageCodec reads of it; None where that is no image to its eyes."""
        try:
            stream = self._codec.CodeStream(np.frombuffer(content, dtype=np.uint8))
            # It reads the header when first asked.
            return stream if stream.width and stream.height else None
        except RuntimeError:
            return None

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
        self, encoded: Sequence[bytes | memoryview], rows: set[int]
    ) -> tuple[dict[int, NDArray[np.uint8]], dict[int, ImageRejected]]:
        """Row -> pixels, and row -> verdict, of what the card could not decode."""
        pixels: dict[int, NDArray[np.uint8]] = {}
        rejected: dict[int, ImageRejected] = {}
        missing = sorted(rows)
        outcomes = self._threads.map(self._judged, [encoded[row] for row in missing])
        for row, outcome in zip(missing, outcomes, strict=True):
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


def _calls(streams: Sequence[Any]) -> Iterator[list[int]]:
    """Rows that nvImageCodec gets at once: so many, and so large, that they fit."""
    rows: list[int] = []
    num_bytes = 0
    for row, stream in enumerate(streams):
        if stream is None:
            continue
        image_bytes = 3 * stream.width * stream.height
        if rows and (len(rows) == _CALL_ROWS or num_bytes + image_bytes > _CALL_BYTES):
            yield rows
            rows, num_bytes = [], 0
        rows.append(row)
        num_bytes += image_bytes
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
