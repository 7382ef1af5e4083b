"""Tests of engine/truncation.py, most through `rgb_image`: no image half painted in, none lost."""

import io
import random
import struct

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import jpeg_factory

from engine.images import ImageLimits, ImageRejected, rgb_image
from tests import image_files

LIMITS = ImageLimits()
JPEG_END = b"\xff\xd9"


def jpeg_options(mode: str, rng: random.Random) -> dict[str, object]:
    options: dict[str, object] = {
        "quality": rng.choice([1, 30, 75, 95, 100]),
        **rng.choice([{}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}]),
    }
    return {**options, "subsampling": rng.choice([0, 1, 2])} if mode == "RGB" else options


@pytest.mark.parametrize("seed", range(40))
def test_a_jpeg_is_whole_or_rejected(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(8, 200), rng.randint(8, 200)
    mode = rng.choice(["RGB", "L", "CMYK"])
    whole = image_files.encode(
        image_files.photo(*size).convert(mode), "JPEG", **jpeg_options(mode, rng)
    )
    expected = Image.open(io.BytesIO(whole)).convert("RGB")
    np.testing.assert_array_equal(rgb_image(whole, limits=LIMITS), expected)
    stream = io.BytesIO(whole)
    jpeg_factory(stream)
    # A few blocks may be missing unnoticed: libjpeg reads 8 bytes behind the last one.
    for cut in range(stream.tell(), len(whole) - 60, len(whole) // 4 + 1):
        with pytest.raises(ImageRejected, match="truncated_image"):
            rgb_image(whole[:cut] + JPEG_END, limits=LIMITS)


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255)], ids=str)
def test_a_jpeg_of_one_colour_is_whole(color: tuple[int, int, int]) -> None:
    encoded = image_files.jpeg(image_files.flat(color, (501, 333)))
    assert rgb_image(encoded, limits=LIMITS).getpixel((500, 332)) == color


@pytest.mark.parametrize("tail", [b"", b"\0" * 100, JPEG_END, image_files.jpeg()], ids=len)
def test_what_follows_a_jpeg_does_not_matter(tail: bytes) -> None:
    whole = image_files.jpeg(image_files.photo(100, 80))
    expected = rgb_image(whole, limits=LIMITS)
    np.testing.assert_array_equal(rgb_image(whole + tail, limits=LIMITS), expected)


def test_the_end_of_a_thumbnail_is_not_the_end_of_a_jpeg() -> None:
    segment = b"Exif\0\0" + image_files.jpeg()
    whole = image_files.jpeg(image_files.photo(100, 80))
    encoded = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]
    np.testing.assert_array_equal(
        rgb_image(encoded, limits=LIMITS), rgb_image(whole, limits=LIMITS)
    )


def test_jpegs_of_several_scans_or_frames_are_left_alone() -> None:
    photo = image_files.photo(100, 80)
    for encoded in (
        image_files.jpeg(photo, progressive=True),
        image_files.encode(photo, "MPO", save_all=True, append_images=[photo.rotate(180)]),
    ):
        expected = Image.open(io.BytesIO(encoded)).convert("RGB")
        np.testing.assert_array_equal(rgb_image(encoded, limits=LIMITS), expected)


# Bits per sample, colour type, bytes per row of 9 pixels: all that PNG allows.
PNG_LAYOUTS = [
    *[(bits, 0, num_bytes) for bits, num_bytes in ((1, 2), (2, 3), (4, 5), (8, 9), (16, 18))],
    *[(bits, 3, num_bytes) for bits, num_bytes in ((1, 2), (2, 3), (4, 5), (8, 9))],
    *[(8, 2, 27), (16, 2, 54), (8, 4, 18), (16, 4, 36), (8, 6, 36), (16, 6, 72)],
]


def zero_png(num_bits: int, color_type: int, *, num_bytes: int) -> bytes:
    """9 x 7 pixels, all zero: the case where a look at the last row does not settle it."""
    header = struct.pack(">IIBBBBB", 9, 7, num_bits, color_type, 0, 0, 0)
    palette = image_files.png_chunk(b"PLTE", bytes(6)) if color_type == 3 else b""
    return image_files.png_chunks(header, rows=bytes(num_bytes), extra=palette)


@pytest.mark.parametrize(("num_bits", "color_type", "row_bytes"), PNG_LAYOUTS)
def test_a_png_is_whole_or_rejected(num_bits: int, color_type: int, row_bytes: int) -> None:
    whole = zero_png(num_bits, color_type, num_bytes=7 * (1 + row_bytes))
    assert rgb_image(whole, limits=LIMITS).size == (9, 7)
    # Pillow itself notices an end inside a row.
    for num_rows in (1, 4, 6):
        cut = zero_png(num_bits, color_type, num_bytes=num_rows * (1 + row_bytes))
        with pytest.raises(ImageRejected, match="truncated_image: PNG: fewer rows"):
            rgb_image(cut, limits=LIMITS)


def test_a_large_black_png_in_many_chunks_is_whole() -> None:
    photo = image_files.photo(900, 700)
    photo.paste((0, 0, 0), (0, 600, 900, 700))
    encoded = image_files.png(photo)
    assert encoded.count(b"IDAT") > 1
    assert rgb_image(encoded, limits=LIMITS).tobytes() == photo.tobytes()
