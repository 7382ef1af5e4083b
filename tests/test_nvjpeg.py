"""The binding of nvJPEG: against the real library as far as no GPU is needed, and a fake of it."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from engine.decoding import nvjpeg
from engine.decoding.nvjpeg import CallFailedError, NvJpeg, load_library
from engine.errors import DeviceError, DeviceMemoryError
from tests import image_files
from tests.fake_nvjpeg import HARDWARE, FakeNvjpeg

CALLED = [name for name in dir(FakeNvjpeg) if name.startswith("nvjpeg")]
INTERPOLATION = 32


def decode(
    decoder: NvJpeg, images: Sequence[bytes], *, padding: int = 0
) -> list[np.ndarray] | None:
    """Decode to host memory, rows apart by some bytes."""
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    content = [np.frombuffer(image, dtype=np.uint8) for image in images]
    lines = [np.zeros((height, 3 * width + padding), np.uint8) for width, height in sizes]
    is_done = decoder.decode(
        np.array([image.ctypes.data for image in content]),
        num_bytes=np.array([len(image) for image in content]),
        targets=np.array([target.ctypes.data for target in lines]),
        row_bytes=np.array([target.shape[1] for target in lines]),
        stream=0,
    )
    if not is_done:
        return None
    assert all(not target[:, target.shape[1] - padding :].any() for target in lines if padding)
    return [
        target[:, : 3 * width].reshape(height, width, 3)
        for target, (width, height) in zip(lines, sizes, strict=True)
    ]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeNvjpeg:
    fake = FakeNvjpeg()
    monkeypatch.setattr(nvjpeg, "load_library", lambda: fake)
    return fake


def test_the_real_library_has_what_is_called():
    real = load_library()
    assert len(CALLED) == 6
    for name in CALLED:
        assert getattr(real, name)


def test_without_a_gpu_the_real_library_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError) as caught:
        NvJpeg()
    message = str(caught.value)
    assert message.startswith("nvJPEG failed on this GPU (status 6, execution failed)")
    assert message.endswith("use --decode cpu")


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    from cuda import pathfinder

    def missing(name: str):
        raise pathfinder.DynamicLibNotFoundError(f'Failure finding "{name}"\nmore')

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
    with pytest.raises(DeviceError) as caught:
        load_library()
    assert str(caught.value) == (
        "nvJPEG cannot be loaded (Failure finding \"nvjpeg\"): pip install 'clipmill[gpu]', or use "
        "--decode cpu"
    )


def test_images_come_where_they_are_wanted(library: FakeNvjpeg):
    decoder = NvJpeg()
    assert library.created == [(HARDWARE, INTERPOLATION)]
    images = [image_files.jpeg(image_files.photo(20 + row, 17)) for row in range(3)]
    found = decode(decoder, images, padding=5)
    assert found is not None
    for image, pixels in zip(images, found, strict=True):
        assert np.array_equal(pixels, np.array(Image.open(io.BytesIO(image))))
    decoder.close()
    assert library.live == set()


@pytest.mark.parametrize(
    "odd",
    [image_files.png(), image_files.jpeg(image_files.photo(20, 17), progressive=True)],
    ids=["bad", "not supported"],
)
def test_one_that_is_none_spoils_its_batch_and_no_other(library: FakeNvjpeg, odd: bytes):
    decoder = NvJpeg()
    image = image_files.jpeg(image_files.photo(20, 17))
    assert decode(decoder, [image, odd]) is None
    assert decode(decoder, [image]) is not None


def test_a_card_without_engines_for_jpeg_decodes_with_its_cores(library: FakeNvjpeg):
    library.statuses = {f"nvjpegCreateEx {HARDWARE}": 7}
    decoder = NvJpeg()
    assert [backend for backend, _ in library.created] == [HARDWARE, 2]
    assert decode(decoder, [image_files.jpeg()]) is not None


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (5, DeviceMemoryError, "(status 5, out of memory): use smaller batches"),
        (6, CallFailedError, "(status 6, execution failed); use --decode cpu"),
        (8, CallFailedError, "(status 8, internal error); use --decode cpu"),
        (99, CallFailedError, "(status 99, unknown); use --decode cpu"),
    ],
)
def test_what_may_be_no_images_fault(
    library: FakeNvjpeg, status: int, error: type[DeviceError], said: str
):
    decoder = NvJpeg()
    library.statuses = {"nvjpegDecodeBatched": status}
    with pytest.raises(error) as caught:
        decode(decoder, [image_files.jpeg()])
    assert type(caught.value) is error
    assert said in str(caught.value)


def test_a_card_that_nvjpeg_cannot_use(library: FakeNvjpeg):
    library.statuses = {f"nvjpegCreateEx {backend}": 7 for backend in (2, HARDWARE)}
    with pytest.raises(DeviceError, match="status 7, not for this card"):
        NvJpeg()
