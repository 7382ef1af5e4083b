"""Decoding on a GPU against Pillow: formats, orientations, damage; and why it may not be had."""

import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from engine.decoding import nvjpeg
from engine.decoding.checked_nvjpeg import CheckedNvJpeg
from engine.decoding.jpeg_header import Geometry, gpu_geometry
from engine.decoding.jpegs import Jpegs, jpegs_of
from engine.errors import DeviceError, DeviceLostError, DeviceMemoryError
from engine.images import ImageLimits, ImageRejected
from engine.preprocess import MAX_ORDINARY_ASPECT, Preprocessing, decode_pixels
from tests import image_files
from tests.fake_nvjpeg import FakeNvjpeg, images_of_call

from tests.triton_device import DEVICE  # isort: skip

from engine.decoding import gpu_decoder  # isort: skip
from engine.decoding.gpu_decoder import GpuDecoder, decoding_fault  # isort: skip

pytestmark = pytest.mark.usefixtures("whole_lookups")

LIMITS = ImageLimits()
# Of levels, to Pillow's: cards without engines for JPEGs round their transform otherwise.
MAX_MEAN_DIFFERENCE = 0.1


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


def jpegs(encoded: Sequence[bytes]) -> Jpegs:
    return jpegs_of(encoded, geometries=[geometry(image) for image in encoded])


def geometry(encoded: bytes) -> Geometry:
    """What is no image has one as well, so that nvJPEG has to say so."""
    found = gpu_geometry(encoded, limits=LIMITS, max_aspect=MAX_ORDINARY_ASPECT)
    if found is not None:
        return found
    try:
        return Geometry(*Image.open(io.BytesIO(encoded)).size, 1)
    except UnidentifiedImageError:
        return Geometry(16, 16, 1)


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
    "small": jpeg(image_files.photo(17, 16)),
    "large": jpeg(image_files.photo(2100, 1400)),
    **{f"orientation {number}": turned(number) for number in range(1, 9)},
}


@pytest.mark.gpu
def test_the_card_decodes_what_suits_it_nearly_as_pillow_does(decoder: GpuDecoder):
    for name, encoded in ORDINARY.items():
        assert gpu_geometry(encoded, limits=LIMITS, max_aspect=MAX_ORDINARY_ASPECT), name
    decoded = decoder.decode(jpegs(list(ORDINARY.values())))
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
        *(photo, image_files.png(), half, photo, b"nonsense" * 9, half + b"\xff\xd9"),
        *(jpeg(image_files.photo(90, 70).convert("CMYK")), photo),
    ]
    assert by_pillow(half + b"\xff\xd9") == "truncated_image"
    decoded = decoder.decode(jpegs(odd))
    alone = decoder.decode(jpegs([photo])).pixels[0].cpu()
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
def test_every_size_of_every_sampling_as_pillow_does(decoder: GpuDecoder):
    sizes = [(16 + row, 16 + (7 * row) % 30) for row in range(30)]
    photos = [
        jpeg(image_files.photo(width, height, seed=width), subsampling=subsampling)
        for width, height in sizes
        for subsampling in (0, 1, 2)
    ]
    decoded = decoder.decode(jpegs(photos))
    assert decoded.num_by_cpu == 0
    for photo, pixels in zip(photos, decoded.pixels.cpu().numpy(), strict=True):
        size = Image.open(io.BytesIO(photo)).size
        assert np.abs(pixels.astype(int) - by_pillow(photo)).mean() < MAX_MEAN_DIFFERENCE, size


@pytest.mark.gpu
def test_more_images_than_one_call_takes(decoder: GpuDecoder, monkeypatch: pytest.MonkeyPatch):
    photos = jpegs([*ORDINARY.values(), b"nonsense", ORDINARY["grey"]])
    whole = decoder.decode(photos)
    monkeypatch.setattr(gpu_decoder, "_CALL_BYTES", 3 * 200 * 200)
    parts = decoder.decode(photos)
    assert parts.rows.tolist() == whole.rows.tolist()
    assert bool((parts.pixels == whole.pixels).all())


@pytest.mark.gpu
def test_the_cards_cores_decode_nearly_as_its_engines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nvjpeg, "_HARDWARE", nvjpeg._GPU_HYBRID)
    decoder = GpuDecoder(CLIP, limits=LIMITS, num_threads=1)
    # Of up to 50 images, nvJPEG reads the codes on a CPU there.
    for repeats in (1, 4):
        decoded = decoder.decode(jpegs(list(ORDINARY.values()) * repeats))
        assert decoded.num_by_cpu == 0
        named = list(ORDINARY.items()) * repeats
        for (name, encoded), pixels in zip(named, decoded.pixels, strict=True):
            difference = np.abs(pixels.cpu().numpy().astype(int) - by_pillow(encoded)).mean()
            assert difference < MAX_MEAN_DIFFERENCE, name
    decoder.close()


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        (10**9, [[0, 1, 2, 3]]),
        (800, [[0], [1], [2, 3]]),
        (900, [[0, 1], [2, 3]]),
        (1, [[0], [1], [2], [3]]),
    ],
)
def test_calls_are_of_so_many_bytes(
    monkeypatch: pytest.MonkeyPatch, max_bytes: int, expected: list[list[int]]
):
    monkeypatch.setattr(gpu_decoder, "_CALL_BYTES", max_bytes)
    sizes = np.array([300, 600, 300, 300])
    assert [rows.tolist() for rows in gpu_decoder._calls(sizes)] == expected
    assert list(gpu_decoder._calls(sizes[:0])) == []


@pytest.mark.gpu
def test_a_batch_without_any_image(decoder: GpuDecoder):
    decoded = decoder.decode(jpegs([b"nonsense", b"nonsense" * 9]))
    assert (len(decoded.rows), len(decoded.pixels), set(decoded.rejected)) == (0, 0, {0, 1})


@pytest.mark.gpu
def test_pixels_of_others_follow(decoder: GpuDecoder):
    batch = jpegs([jpeg(image_files.photo(100, 90)), b"nonsense"])
    beside = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    beside.flags.writeable = False  # as Ray's are
    decoded = decoder.decode(batch, beside=beside)
    assert (decoded.rows.tolist(), set(decoded.rejected)) == ([0], {1})
    assert bool((decoded.pixels[:1] == decoder.decode(batch).pixels).all())
    assert (decoded.pixels[1:].cpu().numpy() == beside).all()


@pytest.mark.gpu
def test_batches_of_all_sizes_give_the_same_bits(decoder: GpuDecoder):
    photos = [jpeg(image_files.photo(100 + 9 * seed, 90, seed=seed)) for seed in range(12)]
    whole = decoder.decode(jpegs(photos)).pixels.cpu()
    for num_rows in (1, 5, 12, 3):
        some = decoder.decode(jpegs(photos[:num_rows])).pixels.cpu()
        assert bool((some == whole[:num_rows]).all())
    assert decoder.decode(jpegs([])).pixels.shape == (0, 64, 64, 3)
    assert bool((decoder.decode(jpegs(photos[::-1])).pixels.cpu() == whole.flip(0)).all())


@pytest.mark.gpu
def test_batches_of_several_threads_come_as_they_do_alone(decoder: GpuDecoder):
    photos = [jpeg(image_files.photo(100 + 9 * seed, 90, seed=seed)) for seed in range(12)]
    cut = [photo[: len(photo) // 2] + b"\xff\xd9" for photo in photos]
    batches = [
        [cut[row] if (row + number) % 5 == 0 else photos[row] for row in range(number % 12 + 1)]
        for number in range(60)
    ]
    alone = [decoder.decode(jpegs(batch)) for batch in batches]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(decoder.decode, map(jpegs, batches)))
    for number, (found, expected) in enumerate(zip(together, alone, strict=True)):
        assert found.rows.tolist() == expected.rows.tolist(), number
        assert set(found.rejected) == set(expected.rejected), number
        assert bool((found.pixels == expected.pixels).all()), number


class FailingNvjpeg:
    """The real nvJPEG; calls that it did fail all the same, if they are of certain images."""

    def __init__(self) -> None:
        self._real = nvjpeg.load_library()
        self.faults: set[bytes] = set()
        """Images."""
        self.num_started = 0
        """Decoders made."""
        self.num_failed: Counter[bytes] = Counter()
        """Of each of those images, calls."""
        self._batch_rows: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def nvjpegJpegStateCreate(self, *arguments: Any) -> int:  # noqa: N802
        self.num_started += 1
        return self._real.nvjpegJpegStateCreate(*arguments)

    def nvjpegDecodeBatchedInitialize(  # noqa: N802
        self, handle: Any, state: Any, batch_rows: int, *arguments: Any
    ) -> int:
        self._batch_rows[state.value] = batch_rows
        return self._real.nvjpegDecodeBatchedInitialize(handle, state, batch_rows, *arguments)

    def nvjpegDecodeBatched(  # noqa: N802
        self, handle: Any, state: Any, sources: Any, num_bytes: Any, *arguments: Any
    ) -> int:
        status = self._real.nvjpegDecodeBatched(handle, state, sources, num_bytes, *arguments)
        images = images_of_call(sources, num_bytes, count=self._batch_rows[state.value])
        at_fault = self.faults.intersection(images)
        self.num_failed.update(at_fault)
        return 6 if at_fault else status


@pytest.mark.gpu
def test_after_a_call_that_fails_nvjpeg_starts_again_on_the_card_and_decodes_as_before(
    monkeypatch: pytest.MonkeyPatch,
):
    library = FailingNvjpeg()
    monkeypatch.setattr(nvjpeg, "load_library", lambda: library)
    decoder = GpuDecoder(CLIP, limits=LIMITS, num_threads=1)
    photo, faulty = ORDINARY["4:2:0"], ORDINARY["4:4:4"]
    half = photo[: len(photo) // 2]
    batch = [photo, faulty, b"nonsense" * 9, ORDINARY["grey"], half + b"\xff\xd9", photo, half]
    before = decoder.decode(jpegs(batch))
    num_started = library.num_started
    library.faults = {faulty}
    failing = decoder.decode(jpegs(batch))
    # At all, at a half, ...; and none is called again at which a call failed.
    assert library.num_failed[faulty] >= 2
    assert library.num_started >= num_started + library.num_failed[faulty]
    library.faults = set()
    after = decoder.decode(jpegs(batch))
    assert failing.num_by_cpu == before.num_by_cpu + 1
    assert after.num_by_cpu == before.num_by_cpu
    for decoded in (failing, after):
        assert decoded.rows.tolist() == before.rows.tolist()
        assert set(decoded.rejected) == set(before.rejected)
    assert bool((after.pixels == before.pixels).all())
    for row, pixels, as_before in zip(
        before.rows.tolist(), failing.pixels.cpu(), before.pixels.cpu(), strict=True
    ):
        if batch[row] == faulty:
            assert np.array_equal(pixels.numpy(), by_pillow(faulty))
        else:
            assert bool((pixels == as_before).all())
    decoder.close()


@pytest.mark.gpu
def test_the_card_at_hand_decodes():
    assert decoding_fault(CLIP) is None


class Stream:
    """A CUDA stream on which all is done at once."""

    cuda_stream = 0

    def __init__(self, device: object = None, *, priority: int = 0) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def without_card(monkeypatch: pytest.MonkeyPatch):
    """A decoder whose card is this machine's CPU, and its library."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, it decodes for real above")
    library = FakeNvjpeg()
    monkeypatch.setattr(nvjpeg, "load_library", lambda: library)
    monkeypatch.setattr(gpu_decoder, "_CALL_BYTES", 3 * 1000)
    monkeypatch.setattr(gpu_decoder, "CheckedNvJpeg", lambda _: CheckedNvJpeg(DEVICE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    decoder = GpuDecoder(CLIP, limits=LIMITS, num_threads=2)
    decoder._device = DEVICE
    yield decoder, library
    decoder.close()


def test_rows_of_a_batch_whoever_decodes_them(without_card):
    decoder, library = without_card
    photos = [jpeg(image_files.photo(17 + row, 16, seed=row), quality=60) for row in range(5)]
    early = photos[0][:-20] + b"\xff\xd9"
    batch = [photos[0], image_files.png(), b"nonsense", *photos[1:], image_files.png()[:40], b""]
    batch += [early, photos[1]]
    decoded = decoder.decode(jpegs(batch))
    assert max(library.num_rows) == 3
    assert decoded.rows.tolist() == [0, 1, 3, 4, 5, 6, 10]
    for row, pixels in zip(decoded.rows, decoded.pixels.numpy(), strict=True):
        assert np.array_equal(pixels, by_pillow(batch[row])), row
    reasons = {row: verdict.reason for row, verdict in decoded.rejected.items()}
    assert reasons == {row: by_pillow(batch[row]) for row in (2, 7, 8, 9)}
    assert reasons[9] == "truncated_image"
    assert decoded.num_by_cpu == 5
    nothing = decoder.decode(jpegs([b""]))
    assert (len(nothing.rows), tuple(nothing.pixels.shape)) == (0, (0, 64, 64, 3))
    assert decoder.decode(jpegs([])).pixels.shape == (0, 64, 64, 3)


@pytest.mark.parametrize("num_images", [2, 0])
def test_pixels_that_follow_those_of_images(
    without_card, monkeypatch: pytest.MonkeyPatch, num_images: int
):
    decoder, _ = without_card
    monkeypatch.setattr(gpu_decoder, "find_early_ends", all_whole)
    photos = [jpeg(image_files.photo(17, 16, seed=seed)) for seed in range(num_images)]
    beside = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    beside.flags.writeable = False  # as Ray's are
    images = [image_files.png(), *photos]  # the first is Pillow's
    decoded = decoder.decode(jpegs([*images, b"nonsense"]), beside=beside)
    assert decoded.rows.tolist() == list(range(len(images)))
    assert set(decoded.rejected) == {len(images)}
    expected = [*map(by_pillow, images), *beside]
    assert np.array_equal(decoded.pixels.numpy(), np.array(expected))


def all_whole(_: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """In place of `find_early_ends`."""
    return torch.zeros(len(bounds)).bool()


def test_what_ends_early_does_not_come_to_the_library(without_card):
    decoder, library = without_card
    photo = jpeg(image_files.photo(17, 16))
    decoded = decoder.decode(jpegs([photo, photo[:-20] + b"\xff\xd9", b"nonsense"]))
    assert library.num_rows == [1]
    assert (decoded.rows.tolist(), set(decoded.rejected)) == ([0], {1, 2})


def test_a_batch_with_one_that_is_none_is_decoded_again_by_halves(
    without_card, monkeypatch: pytest.MonkeyPatch
):
    decoder, library = without_card
    monkeypatch.setattr(gpu_decoder, "find_early_ends", all_whole)
    photo = jpeg(image_files.photo(17, 16))
    decoder.decode(jpegs([photo] * 3 + [b"nonsense"]))
    assert library.num_rows == [3, 1]
    library.num_rows.clear()
    decoded = decoder.decode(jpegs([photo, b"nonsense", photo]))
    assert library.num_rows == [3, 2, 1, 1, 1]
    assert decoded.rows.tolist() == [0, 2]
    assert decoded.num_by_cpu == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_upright(without_card, orientation: int):
    decoder, _ = without_card
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    encoded = jpeg(image_files.four_corners(30, 20), exif=exif)
    decoded = decoder.decode(jpegs([encoded]))
    assert decoded.num_by_cpu == 0
    assert np.array_equal(decoded.pixels[0].numpy(), by_pillow(encoded))


def test_images_with_others_between_them(without_card):
    decoder, _ = without_card
    photos = [jpeg(image_files.photo(17 + row, 16, seed=row), quality=60) for row in range(4)]
    whole = jpegs(photos)
    some = Jpegs(
        content=whole.content, bounds=whole.bounds[1::2], geometries=whole.geometries[1::2]
    )
    decoded = decoder.decode(some)
    assert decoded.rows.tolist() == [0, 1]
    for photo, pixels in zip(photos[1::2], decoded.pixels.numpy(), strict=True):
        assert np.array_equal(pixels, by_pillow(photo))


def test_batches_of_several_threads_take_turns(without_card, monkeypatch: pytest.MonkeyPatch):
    decoder, library = without_card
    # Triton's interpreter is for one thread.
    monkeypatch.setattr(
        gpu_decoder, "resample", lambda sources, **_: torch.zeros((len(sources), 64, 64, 3))
    )
    monkeypatch.setattr(gpu_decoder, "find_early_ends", all_whole)
    photos = [jpeg(image_files.photo(20, 16 + row)) for row in range(4)]
    batches = [photos[: 1 + number % 4] + [b"nonsense"] * (number % 2) for number in range(12)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(decoder.decode, map(jpegs, batches)))
    assert not library.collided
    assert library.most_at_once == 2
    assert [decoded.rows.tolist() for decoded in found] == [
        [*range(1 + number % 4)] for number in range(12)
    ]
    assert [set(decoded.rejected) for decoded in found] == [
        {1 + number % 4} if number % 2 else set() for number in range(12)
    ]
    assert 1 <= len(decoder._idle_streams) <= 3


def test_images_at_which_calls_fail_are_left_to_pillow_and_the_card_decodes_the_others(
    without_card, monkeypatch: pytest.MonkeyPatch
):
    decoder, library = without_card
    monkeypatch.setattr(gpu_decoder, "find_early_ends", all_whole)
    photos = [jpeg(image_files.photo(17 + row, 16, seed=row), quality=60) for row in range(3)]
    library.faults = {photos[0]: 6, photos[2]: 8}
    decoded = decoder.decode(jpegs(photos))
    # By halves; and one that is whole, after each failure.
    assert library.num_rows == [3, 1, 2, 1, 1, 1, 1, 1, 1]
    assert (decoded.rows.tolist(), decoded.rejected, decoded.num_by_cpu) == ([0, 1, 2], {}, 2)
    for photo, pixels in zip(photos, decoded.pixels.numpy(), strict=True):
        assert np.array_equal(pixels, by_pillow(photo))
    decoder.close()
    assert library.live == set()


def test_a_library_that_fails_whatever_the_image_is_lost(
    without_card, monkeypatch: pytest.MonkeyPatch
):
    decoder, library = without_card
    monkeypatch.setattr(gpu_decoder, "find_early_ends", all_whole)
    photo = jpeg(image_files.photo(17, 16))
    monkeypatch.setitem(library.statuses, "nvjpegDecodeBatched", 6)
    for _ in range(3):
        with pytest.raises(DeviceLostError, match=r"whole, too: .*execution failed"):
            decoder.decode(jpegs([photo]))
    monkeypatch.delitem(library.statuses, "nvjpegDecodeBatched")
    assert decoder.decode(jpegs([photo])).rows.tolist() == [0]
    decoder.close()
    assert library.live == set()


def test_a_card_that_is_lost_at_an_image_is_lost(without_card, monkeypatch: pytest.MonkeyPatch):
    decoder, library = without_card
    monkeypatch.setattr(gpu_decoder, "find_early_ends", all_whole)
    photos = [jpeg(image_files.photo(17, 16, seed=seed)) for seed in range(2)]
    library.faults = {photos[1]: 6}

    def fails(*shape: int, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch, "ones", fails)
    with pytest.raises(DeviceLostError, match=r"\(a card\): .*illegal memory access"):
        decoder.decode(jpegs(photos))


def test_a_decoder_that_cannot_be_made_leaves_nothing(
    without_card, monkeypatch: pytest.MonkeyPatch
):
    _, library = without_card
    before = set(library.live)
    create, calls = library.nvjpegJpegStateCreate, []

    def second_fails(handle: object, state: object) -> int:
        calls.append(handle)
        return 5 if len(calls) == 2 else create(handle, state)

    monkeypatch.setattr(library, "nvjpegJpegStateCreate", second_fails)
    with pytest.raises(DeviceMemoryError):
        GpuDecoder(CLIP, limits=LIMITS, num_threads=2)
    assert library.live == before


def test_why_a_card_may_not_decode(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fault = decoding_fault(CLIP)
    assert fault is not None
    assert fault.endswith("whose kernels resize them, sees no CUDA GPU")
    with pytest.raises(DeviceError) as caught:
        GpuDecoder(CLIP, limits=LIMITS, num_threads=1)
    said = f"images cannot be decoded on the GPU: {fault}; use --decode cpu"
    assert str(caught.value) == said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fault = decoding_fault(preprocessing(resample=1))
    assert fault is not None
    assert "Pillow's filter 1, and only bilinear and bicubic are there" in fault


def test_a_library_that_is_missing_is_why(monkeypatch: pytest.MonkeyPatch):
    def missing():
        raise DeviceError("nvJPEG cannot be loaded")

    monkeypatch.setattr(nvjpeg, "load_library", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    assert decoding_fault(CLIP) == "nvJPEG cannot be loaded"
