"""Decoding on a GPU against Pillow: formats, orientations, damage; and why it may not be had."""

import importlib.util
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from engine.decoding.jpeg_header import suits_gpu
from engine.errors import DeviceError
from engine.images import ImageLimits, ImageRejected
from engine.preprocess import MAX_ORDINARY_ASPECT, Preprocessing, decode_pixels
from tests import image_files

from tests.triton_device import DEVICE  # isort: skip

from engine.decoding import gpu_decoder  # isort: skip
from engine.decoding.gpu_decoder import GpuDecoder, decoding_fault  # isort: skip

LIMITS = ImageLimits()
# Of levels, to Pillow's: the card interpolates colour and rounds its transform otherwise.
MAX_MEAN_DIFFERENCE = 3.0


def preprocessing(**fields) -> Preprocessing:
    return Preprocessing(
        **{"height": 64, "width": 64, "resize": 64, "crop": (64, 64), "resample": 3} | fields,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )


CLIP = preprocessing()


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or image_files.photo(180, 130)).save(buffer, "JPEG", **{"quality": 92} | options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return jpeg(image_files.four_corners(180, 130), exif=exif)


def by_pillow(encoded: bytes):
    """Pixels, or the reason why there are none."""
    try:
        return decode_pixels(encoded, preprocessing=CLIP, limits=LIMITS)
    except ImageRejected as verdict:
        return verdict.reason


@pytest.fixture(scope="module")
def decoder() -> GpuDecoder:
    return GpuDecoder(CLIP, limits=LIMITS, num_threads=4)


ORDINARY = {
    "4:2:0": jpeg(),
    "4:2:2": jpeg(subsampling=1),
    "4:4:4": jpeg(subsampling=0),
    "grey": jpeg(image_files.photo(180, 130).convert("L")),
    "restart markers": jpeg(restart_marker_rows=1),
    "tall": jpeg(image_files.photo(70, 400)),
    "small": jpeg(image_files.photo(9, 7)),
    "large": jpeg(image_files.photo(2100, 1400)),
    **{f"orientation {number}": turned(number) for number in range(1, 9)},
}


@pytest.mark.gpu
def test_the_card_decodes_what_suits_it_nearly_as_pillow_does(decoder: GpuDecoder):
    for name, encoded in ORDINARY.items():
        assert suits_gpu(encoded, limits=LIMITS, max_aspect=MAX_ORDINARY_ASPECT), name
    decoded = decoder.decode(list(ORDINARY.values()))
    assert (dict(decoded.rejected), decoded.num_by_cpu) == ({}, 0)
    assert decoded.pixels.shape == (len(ORDINARY), 64, 64, 3)
    for (name, encoded), pixels in zip(ORDINARY.items(), decoded.pixels, strict=True):
        difference = np.abs(pixels.cpu().numpy().astype(int) - by_pillow(encoded)).mean()
        assert difference < MAX_MEAN_DIFFERENCE, name


@pytest.mark.gpu
def test_what_the_card_cannot_decode_is_left_to_pillow_and_harms_no_neighbour(decoder: GpuDecoder):
    photo = ORDINARY["4:2:0"]
    half = photo[: len(photo) // 2]
    odd = [
        *(photo, image_files.png(), half, photo, b"nonsense" * 9, half + b"\xff\xd9", b""),
        *(jpeg(image_files.photo(90, 70).convert("CMYK")), photo),
    ]
    assert by_pillow(half + b"\xff\xd9") == "truncated_image"
    decoded = decoder.decode(odd)
    alone = decoder.decode([photo]).pixels[0].cpu()
    found = dict(zip(decoded.rows.tolist(), decoded.pixels.cpu(), strict=True))
    assert list(found) == sorted(set(range(len(odd))) - set(decoded.rejected))
    for row, encoded in enumerate(odd):
        expected = by_pillow(encoded)
        if isinstance(expected, str):
            assert decoded.rejected[row].reason == expected
        elif encoded == photo:
            assert bool((found[row] == alone).all())
        else:
            assert np.abs(found[row].numpy().astype(int) - expected).mean() < MAX_MEAN_DIFFERENCE


@pytest.mark.gpu
def test_more_images_than_one_call_takes(decoder: GpuDecoder, monkeypatch: pytest.MonkeyPatch):
    photos = [*ORDINARY.values(), b"nonsense", ORDINARY["grey"]]
    whole = decoder.decode(photos)
    for limits in ({"_CALL_ROWS": 4}, {"_CALL_BYTES": 3 * 200 * 200}):
        for name, value in limits.items():
            monkeypatch.setattr(gpu_decoder, name, value)
        parts = decoder.decode(photos)
        assert parts.rows.tolist() == whole.rows.tolist()
        assert bool((parts.pixels == whole.pixels).all())


@pytest.mark.parametrize(
    ("max_rows", "max_bytes", "expected"),
    [
        (3, 10**9, [[0, 2, 3], [4, 5]]),
        (9, 3 * 250, [[0, 2], [3], [4, 5]]),
        (9, 1, [[0], [2], [3], [4], [5]]),
    ],
)
def test_calls_are_of_so_many_images_and_bytes(
    monkeypatch: pytest.MonkeyPatch, max_rows: int, max_bytes: int, expected: list[list[int]]
):
    monkeypatch.setattr(gpu_decoder, "_CALL_ROWS", max_rows)
    monkeypatch.setattr(gpu_decoder, "_CALL_BYTES", max_bytes)
    small, large = (object(), 300), (object(), 600)
    streams = [small, None, small, large, small, small]
    assert list(gpu_decoder._calls(streams)) == expected
    assert list(gpu_decoder._calls([None])) == []


@pytest.mark.gpu
def test_a_batch_without_any_image(decoder: GpuDecoder):
    decoded = decoder.decode([b"", b"nonsense"])
    assert (len(decoded.rows), len(decoded.pixels), set(decoded.rejected)) == (0, 0, {0, 1})


@pytest.mark.gpu
def test_batches_of_all_sizes_give_the_same_bits(decoder: GpuDecoder):
    photos = [jpeg(image_files.photo(100 + 9 * seed, 90, seed=seed)) for seed in range(12)]
    whole = decoder.decode(photos).pixels.cpu()
    for num_rows in (1, 5, 12, 3):
        assert bool((decoder.decode(photos[:num_rows]).pixels.cpu() == whole[:num_rows]).all())
    assert decoder.decode([]).pixels.shape == (0, 64, 64, 3)
    assert bool((decoder.decode(photos[::-1]).pixels.cpu() == whole.flip(0)).all())


@pytest.mark.gpu
def test_batches_of_several_threads_come_as_they_do_alone(decoder: GpuDecoder):
    photos = [jpeg(image_files.photo(100 + 9 * seed, 90, seed=seed)) for seed in range(12)]
    cut = [photo[: len(photo) // 2] + b"\xff\xd9" for photo in photos]
    batches = [
        [cut[row] if (row + number) % 5 == 0 else photos[row] for row in range(number % 12 + 1)]
        for number in range(60)
    ]
    alone = [decoder.decode(batch) for batch in batches]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(decoder.decode, batches))
    for number, (found, expected) in enumerate(zip(together, alone, strict=True)):
        assert found.rows.tolist() == expected.rows.tolist(), number
        assert set(found.rejected) == set(expected.rejected), number
        assert bool((found.pixels == expected.pixels).all()), number


@pytest.mark.gpu
def test_the_card_at_hand_decodes():
    assert decoding_fault(CLIP) is None


class Picture:
    """A decoded image as nvImageCodec gives it, but in host memory."""

    def __init__(self, pixels) -> None:
        self.pixels = pixels
        self.__cuda_array_interface__ = pixels.__array_interface__


class Codec:
    """nvImageCodec without a GPU: JPEGs by Pillow, anything else not at all."""

    BackendKind = SimpleNamespace(HW_GPU_ONLY=1, GPU_ONLY=2, HYBRID_CPU_GPU=3)
    ColorSpec = SimpleNamespace(SRGB=1)

    def __init__(self) -> None:
        self.num_rows: list[int] = []
        self.collided = False
        self._busy = threading.Lock()

    def Backend(self, kind: int) -> int:  # noqa: N802 - its name there
        return kind

    def DecodeParams(self, **options: object) -> dict[str, object]:  # noqa: N802
        return options

    def Decoder(self, **options: object) -> "Codec":  # noqa: N802
        return self

    def CodeStream(self, content):  # noqa: N802
        try:
            return Image.open(io.BytesIO(content.tobytes()))
        except UnidentifiedImageError as error:
            raise RuntimeError("Failed to get image info") from error

    def decode(self, streams, **options: object):
        self.num_rows.append(len(streams))
        if not self._busy.acquire(blocking=False):
            self.collided = True
            return [None] * len(streams)
        time.sleep(0.01)
        images = [
            Picture(np.array(stream.convert("RGB"))) if stream.format == "JPEG" else None
            for stream in streams
        ]
        self._busy.release()
        return images


class Stream:
    """A CUDA stream on which all is done at once."""

    cuda_stream = 0

    def __init__(self, device: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def without_card(monkeypatch: pytest.MonkeyPatch):
    """A decoder whose card is this machine's CPU, and its codec."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, it decodes for real above")
    codec = Codec()
    monkeypatch.setattr(gpu_decoder, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu_decoder, "_nvimgcodec", lambda: codec)
    monkeypatch.setattr(gpu_decoder, "_CALL_ROWS", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    decoder = GpuDecoder(CLIP, limits=LIMITS, num_threads=2)
    decoder._device = DEVICE
    yield decoder, codec
    decoder.close()


def test_rows_of_a_batch_whoever_decodes_them(without_card):
    decoder, codec = without_card
    photos = [jpeg(image_files.photo(17 + row, 16, seed=row), quality=60) for row in range(5)]
    early = photos[0][:-20] + b"\xff\xd9"
    batch = [photos[0], image_files.png(), b"nonsense", *photos[1:], image_files.png()[:40], b""]
    batch += [early, photos[1]]
    decoded = decoder.decode(batch)
    assert codec.num_rows == [3, 3, 2]
    assert decoded.rows.tolist() == [0, 1, 3, 4, 5, 6, 10]
    for row, pixels in zip(decoded.rows, decoded.pixels.numpy(), strict=True):
        assert np.array_equal(pixels, by_pillow(batch[row])), row
    reasons = {row: verdict.reason for row, verdict in decoded.rejected.items()}
    assert reasons == {row: by_pillow(batch[row]) for row in (2, 7, 8, 9)}
    assert reasons[9] == "truncated_image"
    assert decoded.num_by_cpu == 5
    nothing = decoder.decode([b""])
    assert (len(nothing.rows), tuple(nothing.pixels.shape)) == (0, (0, 64, 64, 3))
    assert decoder.decode([]).pixels.shape == (0, 64, 64, 3)


def test_batches_of_several_threads_take_turns(without_card, monkeypatch: pytest.MonkeyPatch):
    decoder, codec = without_card
    # Triton's interpreter is for one thread.
    monkeypatch.setattr(
        gpu_decoder, "resample", lambda sources, **_: torch.zeros((len(sources), 64, 64, 3))
    )
    monkeypatch.setattr(
        gpu_decoder, "find_early_ends", lambda _, bounds: torch.zeros(len(bounds) - 1).bool()
    )
    photos = [jpeg(image_files.photo(20, 10 + row)) for row in range(4)]
    batches = [photos[: 1 + number % 4] + [b"nonsense"] * (number % 2) for number in range(12)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(decoder.decode, batches))
    assert not codec.collided
    assert [decoded.rows.tolist() for decoded in found] == [
        [*range(1 + number % 4)] for number in range(12)
    ]
    assert [set(decoded.rejected) for decoded in found] == [
        {1 + number % 4} if number % 2 else set() for number in range(12)
    ]
    assert 1 <= len(decoder._idle_sides) <= 3


def test_why_a_card_may_not_decode(monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        gpu_decoder, "find_spec", lambda name: None if "nvi" in name else real(name)
    )
    fault = "nvImageCodec is not installed (pip install 'clipmill[gpu]')"
    assert decoding_fault(CLIP) == fault
    with pytest.raises(DeviceError) as caught:
        GpuDecoder(CLIP, limits=LIMITS, num_threads=1)
    said = f"images cannot be decoded on the GPU: {fault}; use --decode cpu"
    assert str(caught.value) == said
    monkeypatch.setattr(gpu_decoder, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fault = decoding_fault(CLIP)
    assert fault is not None
    assert fault.endswith("whose kernels resize them, sees no CUDA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fault = decoding_fault(preprocessing(resample=1))
    assert fault is not None
    assert "Pillow's filter 1, and only bilinear and bicubic are there" in fault
