"""Resizing on a GPU against Pillow, bit by bit; without a GPU in Triton's interpreter."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from engine.images import ImageLimits
from engine.preprocess import Preprocessing, decode_pixels
from tests import image_files

from tests.triton_device import DEVICE  # isort: skip

from engine.decoding.resample import FILTERS, Sources, resample, upright  # isort: skip

BILINEAR, BICUBIC = 2, 3
# (width, height): both sides up and down, up and down at once, tall ones, the smallest.
SIZES = [(67, 51), (20, 33), (31, 90), (32, 32), (5, 7), (1, 1), (100, 12), (20, 24), (64, 33)]


def preprocessing(**fields) -> Preprocessing:
    return Preprocessing(
        **{"height": 24, "width": 24, "resize": 24, "crop": (24, 24), "resample": BICUBIC} | fields,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )


def by_pillow(picture: NDArray[np.uint8], chosen: Preprocessing) -> NDArray[np.uint8]:
    encoded = image_files.png(Image.fromarray(picture))
    return decode_pixels(encoded, preprocessing=chosen, limits=ImageLimits())


def resampled(
    pictures: Sequence[NDArray[np.uint8]], chosen: Preprocessing, *, padding: int = 0
) -> NDArray[np.uint8]:
    """Of pictures each row of which is followed by other bytes."""
    padded = [
        torch.from_numpy(
            np.concatenate([picture.reshape(len(picture), -1)] * 2, axis=1)[
                :, : picture[0].size + padding
            ].copy()
        ).to(DEVICE)
        for picture in pictures
    ]
    sources = Sources(
        addresses=np.array([pixels.data_ptr() for pixels in padded], dtype=np.int64),
        size=np.array([picture.shape[1::-1] for picture in pictures]).reshape(-1, 2),
        step_bytes=np.array([(3, pixels.shape[1]) for pixels in padded]).reshape(-1, 2),
    )
    return resample(sources, preprocessing=chosen, device=DEVICE).cpu().numpy()


def noise(size: tuple[int, int], *, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


@pytest.mark.parametrize(
    "chosen",
    [
        preprocessing(),
        preprocessing(resample=BILINEAR),
        preprocessing(width=40, resize=(24, 40), crop=None),
        preprocessing(width=40, resize=(24, 40), crop=None, resample=BILINEAR),
        preprocessing(resize=30),
        preprocessing(height=32, width=36, crop=(32, 36)),
        preprocessing(resize=None),
    ],
    ids=["clip", "bilinear", "exact", "exact bilinear", "cropped", "padded", "crop only"],
)
def test_pictures_of_many_sizes_come_out_as_pillow_makes_them(chosen: Preprocessing):
    pictures = [noise(size, seed=seed) for seed, size in enumerate(SIZES)]
    found = resampled(pictures, chosen)
    assert found.shape == (len(SIZES), chosen.height, chosen.width, 3)
    for picture, pixels in zip(pictures, found, strict=True):
        assert np.array_equal(pixels, by_pillow(picture, chosen)), picture.shape


def test_levels_beyond_black_and_white_are_cut():
    edges = np.zeros((40, 40, 3), np.uint8)
    edges[:, 20:] = 255  # bicubic overshoots on both sides
    (found,) = resampled([edges], preprocessing(resize=60, crop=(24, 24)))
    assert np.array_equal(found, by_pillow(edges, preprocessing(resize=60, crop=(24, 24))))
    assert {0, 255} <= set(found.reshape(-1).tolist())


def test_rows_may_be_longer_than_their_pixels():
    pictures = [noise((30, 41)), noise((50, 26), seed=1)]
    found = resampled(pictures, preprocessing(), padding=7)
    assert np.array_equal(found, resampled(pictures, preprocessing()))


def test_pictures_that_lie_turned_come_out_upright():
    pictures = [noise((30, 41), seed=seed) for seed in range(8)]
    stored = [torch.from_numpy(picture).to(DEVICE) for picture in pictures]
    sources = upright(
        np.array([pixels.data_ptr() for pixels in stored]),
        size=np.array([(30, 41)] * 8),
        orientations=np.arange(1, 9),
    )
    found = resample(sources, preprocessing=preprocessing(), device=DEVICE).cpu().numpy()
    for orientation, (picture, pixels) in enumerate(zip(pictures, found, strict=True), start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG", exif=exif)
        limits = ImageLimits()
        expected = decode_pixels(buffer.getvalue(), preprocessing=preprocessing(), limits=limits)
        assert np.array_equal(pixels, expected), orientation


def test_no_pictures():
    assert resampled([], preprocessing()).shape == (0, 24, 24, 3)


def test_the_filters_are_those_that_pillow_calls_so():
    assert {Image.Resampling(code).name for code in FILTERS} == {"BILINEAR", "BICUBIC"}


@pytest.mark.gpu
def test_photos_in_full_size():
    clip = preprocessing(height=224, width=224, resize=224, crop=(224, 224))
    sizes = [(500, 375), (375, 500), (640, 427), (1600, 1200), (4000, 3000), (333, 640)]
    pictures = [noise(size, seed=seed) for seed, size in enumerate(sizes)]
    for picture, pixels in zip(pictures, resampled(pictures, clip), strict=True):
        assert np.array_equal(pixels, by_pillow(picture, clip)), picture.shape
