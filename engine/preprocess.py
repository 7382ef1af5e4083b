"""Turns encoded image bytes into uint8 pixels: the one definition of resize and crop.

Knows no torch, Ray or Parquet, nor which model reads the pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.images import ImageLimits, Size, rgb_image

MAX_ORDINARY_ASPECT = 20
"""Long over short side of an image that is resized as a whole, as transformers does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """The geometry and the normalisation that a checkpoint was trained with."""

    height: int
    """Pixels of the output."""
    width: int
    """Pixels of the output."""
    resize: int | tuple[int, int] | None
    """Shortest edge in pixels, keeping the aspect; or exactly (height, width); or no resize."""
    crop: tuple[int, int] | None
    """Centre crop to (height, width) after the resize, padded with black where it is smaller."""
    resample: int
    """Pillow's code of the resize filter: 2 is bilinear, 3 is bicubic."""
    mean: tuple[float, float, float]
    """Of R, G and B, subtracted after pixels * rescale_factor; applied inside the tower."""
    std: tuple[float, float, float]
    """Of R, G and B, divided by after the mean; applied inside the tower."""
    rescale_factor: float = 1 / 255
    """Multiplies uint8 pixels first; applied inside the tower."""

    def __post_init__(self) -> None:
        """Raise ValueError for a field out of range, or an output size that does not follow."""
        if self.resize is not None and not _is_positive_int(self.resize):
            _check_pair("resize", self.resize)
        if self.crop is not None:
            _check_pair("crop", self.crop)
        exact = self.resize if isinstance(self.resize, tuple) else None
        output = self.crop or exact
        if output is None:
            raise ValueError(
                f"resize={self.resize!r} and crop=None leave images of different sizes: expected "
                "a crop, or a resize to (height, width)"
            )
        if output != (self.height, self.width):
            raise ValueError(
                f"height={self.height!r}, width={self.width!r}: resize and crop give {output}"
            )
        if isinstance(self.resample, bool) or self.resample not in range(6):
            raise ValueError(
                f"resample={self.resample!r}: expected one of Pillow's filter codes 0 to 5"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not (isinstance(values, tuple) and len(values) == 3 and all(map(_is_real, values))):
                raise ValueError(f"{name}={values!r}: expected a tuple of three finite numbers")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std!r}: expected numbers above 0")
        if not _is_real(self.rescale_factor) or self.rescale_factor <= 0:
            raise ValueError(f"rescale_factor={self.rescale_factor!r}: expected a number above 0")


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_pair(name: str, value: object) -> None:
    if not (isinstance(value, tuple) and len(value) == 2 and all(map(_is_positive_int, value))):
        raise ValueError(f"{name}={value!r}: expected a tuple (height, width) of integers above 0")


def decode_pixels(
    encoded: bytes | memoryview, *, preprocessing: Preprocessing, limits: ImageLimits
) -> npt.NDArray[np.uint8]:
    """Decode, turn upright, resize and crop one image.

    The geometry is that of transformers' image processors on Pillow, pixel for pixel; but an image
    over 20 times longer than wide is cropped while it is resized, so that no long strip is made.

    Args:
        encoded: A JPEG, PNG, WebP, GIF, TIFF or BMP file; of several frames, the first counts.
        preprocessing: The output's size, and how to reach it.
        limits: Above these the image is rejected unseen.

    Returns:
        uint8 [height, width, 3], RGB, HWC, C-contiguous, 0 to 255.

    Raises:
        ImageRejected: The bytes are no usable image; nothing else is raised, whatever they are.
    """
    image = rgb_image(encoded, limits=limits)
    return np.array(_fit(image, preprocessing), dtype=np.uint8)


def resized_size(size: Size, preprocessing: Preprocessing) -> Size:
    """Return (width, height) after the resize; the long edge is truncated, as in transformers."""
    resize = preprocessing.resize
    if resize is None:
        return size
    if isinstance(resize, tuple):
        return resize[1], resize[0]
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _fit(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize and crop; offsets and black padding as in transformers' `center_crop`."""
    width, height = resized_size(image.size, preprocessing)
    if preprocessing.resize is not None:
        if max(image.size) > MAX_ORDINARY_ASPECT * min(image.size):
            image = _resize_strip(image, preprocessing)
            width, height = image.size
        else:
            image = image.resize((width, height), Image.Resampling(preprocessing.resample))
    if preprocessing.crop is None:
        return image
    crop_height, crop_width = preprocessing.crop
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def _resize_strip(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize an image of extreme aspect: only what the crop keeps, and its long edge first.

    The long edge comes first because Pillow starts with the width, and would make the whole
    height of a narrow image as wide as the output.
    """
    left, top, right, bottom = 0.0, 0.0, float(image.width), float(image.height)
    width, height = resized_size(image.size, preprocessing)
    resample = Image.Resampling(preprocessing.resample)
    crop_height, crop_width = preprocessing.crop or (height, width)
    if height > width and height > crop_height:
        step = (bottom - top) / height
        top += (height - crop_height) // 2 * step
        bottom, height = min(top + crop_height * step, bottom), crop_height
    elif width > height and width > crop_width:
        step = (right - left) / width
        left += (width - crop_width) // 2 * step
        right, width = min(left + crop_width * step, right), crop_width
    if bottom - top > right - left:
        image = image.resize((image.width, height), resample, (0, top, image.width, bottom))
        top, bottom = 0, height
    return image.resize((width, height), resample, (left, top, right, bottom))
