"""Tests of engine/preprocess.py against transformers' own image processors and known colours."""

import dataclasses
import io
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from engine import preprocess
from engine.preprocess import (
    REASONS,
    ImageLimits,
    ImageRejected,
    Preprocessing,
    decode_pixels,
    preprocessing_from_config,
    rgb_image,
)
from tests import images

LIMITS = ImageLimits()
CLIP_CONFIG: Mapping[str, object] = {"image_processor_type": "CLIPImageProcessor"}
CLIP = preprocessing_from_config(CLIP_CONFIG, image_size=224)
PROCESSORS = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
}


def reference_pixels(image: Image.Image, config: Mapping[str, Any]) -> np.ndarray:
    """uint8 [H, W, 3] by transformers, before rescaling and normalisation."""
    options = {name: value for name, value in config.items() if name != "image_processor_type"}
    processor = PROCESSORS[config["image_processor_type"]](
        **{**options, "do_rescale": False, "do_normalize": False}
    )
    (pixels,) = processor(images=image.convert("RGB"))["pixel_values"]
    return np.moveaxis(pixels, 0, -1)


def reject_of(encoded: bytes, *, limits: ImageLimits = LIMITS) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        decode_pixels(encoded, preprocessing=CLIP, limits=limits)
    check_reject(caught.value)
    return caught.value


def check_reject(error: ImageRejected) -> None:
    assert error.reason in REASONS
    assert 0 < len(error.detail) <= 200


def center_color(encoded: bytes) -> tuple[int, ...]:
    image = rgb_image(encoded, limits=LIMITS)
    assert image.mode == "RGB"
    color = image.getpixel((image.width // 4, image.height // 4))
    assert isinstance(color, tuple)
    return color


# --- Geometry: the same pixels as transformers ---

ASPECTS = [
    (224, 224),
    (500, 375),
    (375, 500),
    (333, 500),
    (640, 479),
    (225, 224),
    (223, 641),
    (1000, 101),
    (101, 1000),
    (60, 40),
    (5, 7),
    (1, 1),
]
GEOMETRIES: list[Mapping[str, Any]] = [
    CLIP_CONFIG,
    {**CLIP_CONFIG, "resample": 2},
    {**CLIP_CONFIG, "resample": 0},
    {**CLIP_CONFIG, "size": {"shortest_edge": 200}},
    {**CLIP_CONFIG, "size": {"shortest_edge": 77}},
    {**CLIP_CONFIG, "size": {"shortest_edge": 257}, "resample": 1},
    {**CLIP_CONFIG, "size": {"height": 256, "width": 231}},
    {**CLIP_CONFIG, "do_resize": False},
    {"image_processor_type": "SiglipImageProcessor"},
    {"image_processor_type": "ViTImageProcessor"},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}},
]


@pytest.mark.parametrize("config", GEOMETRIES, ids=str)
@pytest.mark.parametrize("size", ASPECTS, ids=str)
def test_pixels_are_those_of_transformers(size: tuple[int, int], config: Mapping[str, Any]) -> None:
    image = images.photo(*size)
    pixels = decode_pixels(
        images.png(image),
        preprocessing=preprocessing_from_config(config, image_size=224),
        limits=LIMITS,
    )
    np.testing.assert_array_equal(pixels, reference_pixels(image, config))


@pytest.mark.parametrize("crop", [225, 31], ids=str)
def test_odd_outputs_are_those_of_transformers(crop: int) -> None:
    config = {**CLIP_CONFIG, "size": {"shortest_edge": 100}, "crop_size": crop}
    image = images.photo(250, 161)
    pixels = decode_pixels(
        images.png(image),
        preprocessing=preprocessing_from_config(config, image_size=crop),
        limits=LIMITS,
    )
    np.testing.assert_array_equal(pixels, reference_pixels(image, config))


@given(
    width=st.integers(1, 700), height=st.integers(1, 700), edge=st.integers(1, 300), seed=st.just(3)
)
@settings(max_examples=40, deadline=None)
def test_any_ordinary_size_gives_the_pixels_of_transformers(
    width: int, height: int, edge: int, seed: int
) -> None:
    # Beyond 20 to 1 the crop happens while resizing, and rounding may differ.
    width, height = max(width, height // 20 + 1), max(height, width // 20 + 1)
    config = {**CLIP_CONFIG, "size": {"shortest_edge": edge}}
    image = images.photo(width, height, seed=seed)
    pixels = decode_pixels(
        images.png(image),
        preprocessing=preprocessing_from_config(config, image_size=224),
        limits=LIMITS,
    )
    np.testing.assert_array_equal(pixels, reference_pixels(image, config))


def test_jpeg_and_grey_pixels_are_those_of_transformers() -> None:
    for image in (images.photo(440, 330), images.photo(440, 330).convert("L")):
        encoded = images.jpeg(image)
        pixels = decode_pixels(encoded, preprocessing=CLIP, limits=LIMITS)
        decoded = Image.open(io.BytesIO(encoded))
        np.testing.assert_array_equal(pixels, reference_pixels(decoded, CLIP_CONFIG))


def test_transparency_is_composited_as_in_transformers() -> None:
    image = images.photo(300, 200)
    image.putalpha(images.photo(300, 200, seed=1).convert("L"))
    pixels = decode_pixels(images.png(image), preprocessing=CLIP, limits=LIMITS)
    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    (expected,) = processor(images=image)["pixel_values"]
    np.testing.assert_array_equal(pixels, np.moveaxis(expected, 0, -1))


def test_pixels_are_contiguous_writable_uint8() -> None:
    for view in (images.png(), memoryview(images.png())):
        pixels = decode_pixels(view, preprocessing=CLIP, limits=LIMITS)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (224, 224, 3)
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 900), (900, 3), (40, 900)])
@pytest.mark.parametrize("processor", ["CLIPImageProcessor", "SiglipImageProcessor"])
def test_extreme_aspects_come_close_to_transformers(size: tuple[int, int], processor: str) -> None:
    config = {"image_processor_type": processor, "resample": 2}
    width, height = size
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    image = Image.fromarray(np.resize(ramp, (height, width)) if width > height else ramp[:, None])
    image = image.resize(size).convert("RGB")
    pixels = decode_pixels(
        images.png(image),
        preprocessing=preprocessing_from_config(config, image_size=224),
        limits=LIMITS,
    )
    if processor == "CLIPImageProcessor" and min(size) == 1:
        # The reference would need 4 GB. The middle of the ramp, and at most a source pixel of it.
        assert pixels.min() >= 126
        assert pixels.max() <= 129
    else:
        difference = np.abs(pixels.astype(int) - reference_pixels(image, config))
        assert difference.max() <= 1


def test_an_extreme_aspect_takes_little_memory() -> None:
    code = (
        "import resource, sys; from engine.preprocess import *; "
        "image = Preprocessing(height=224, width=224, resize={resize}, crop=(224, 224), "
        "resample=3, mean=(0.0,) * 3, std=(1.0,) * 3); encoded = sys.stdin.buffer.read(); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "decode_pixels(encoded, preprocessing=image, limits=ImageLimits()); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    for size in ((1, 500_000), (500_000, 1)):
        for resize in ("224", "(224, 224)"):
            done = subprocess.run(
                [sys.executable, "-c", code.format(resize=resize)],
                input=images.png(Image.new("RGB", size)),
                capture_output=True,
                check=True,
            )
            # Decoded, the strip has 2 MB; resized whole, it would have 450 MB or more.
            assert int(done.stdout) * 1024 < 100 * 2**20


# --- Formats and modes: the colours a person sees ---


def grey(level: int) -> tuple[int, int, int]:
    return (level, level, level)


LEFT_RED = images.RED
COLORS: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "jpeg": (images.jpeg(), LEFT_RED),
    "progressive jpeg": (images.jpeg(progressive=True), LEFT_RED),
    "grey jpeg": (images.jpeg(Image.new("L", images.SIZE, 90)), grey(90)),
    "mpo": (images.mpo(), LEFT_RED),
    "cmyk jpeg": (images.cmyk_jpeg(), (215, 46, 131)),
    "ycck jpeg": (images.ycck_jpeg(), (215, 46, 131)),
    "png": (images.png(), LEFT_RED),
    "black and white png": (images.png(Image.new("1", images.SIZE, 1)), grey(255)),
    "grey png": (images.png(Image.new("L", images.SIZE, 90)), grey(90)),
    "grey alpha png": (images.png(Image.new("LA", images.SIZE, (0, 128))), grey(127)),
    "rgba png": (images.png(Image.new("RGBA", images.SIZE, (255, 0, 0, 128))), (255, 127, 127)),
    "clear png": (images.png(Image.new("RGBA", images.SIZE, (0, 0, 0, 0))), grey(255)),
    "palette png": (images.png(images.flat().quantize(4)), LEFT_RED),
    "palette png with alpha": (images.palette_png_with_transparency(), LEFT_RED),
    "grey png with a clear level": (
        images.png(Image.new("L", images.SIZE, 90), transparency=90),
        grey(255),
    ),
    "rgb png with a clear colour": (images.png(transparency=images.RED), grey(255)),
    "bilevel png with clear black": (
        images.png(Image.new("1", images.SIZE, 0), transparency=0),
        grey(255),
    ),
    "2-bit png": (images.small_grey_png(2, 1), grey(85)),
    "2-bit png with a clear level": (images.small_grey_png(2, 1, transparent=1), grey(255)),
    "4-bit png with a clear level": (images.small_grey_png(4, 5, transparent=5), grey(255)),
    "4-bit png with another clear level": (images.small_grey_png(4, 5, transparent=4), grey(85)),
    "16-bit grey png": (images.png16((0x8034,)), grey(0x80)),
    "dark 16-bit grey png": (images.png16((300,)), grey(1)),
    "white 16-bit grey png": (images.png16((0xFFFF,)), grey(255)),
    "16-bit grey png, clear": (images.png16((0x8034,), transparent=(0x8034,)), grey(255)),
    "16-bit grey png, not clear": (images.png16((0x8034,), transparent=(0x8035,)), grey(0x80)),
    "16-bit grey alpha png": (images.png16((0, 0x8000)), grey(127)),
    "16-bit rgb png": (images.png16((0xC8FF, 0x1E00, 0x2800)), LEFT_RED),
    "16-bit rgb png, clear": (
        images.png16((0xC8FF, 0x1E00, 0x2800), transparent=(0xC8FF, 0x1E00, 0x2800)),
        grey(255),
    ),
    "16-bit rgba png": (images.png16((0xFFFF, 0, 0, 0x8000)), (255, 127, 127)),
    "webp": (images.webp(), LEFT_RED),
    "animated webp": (images.animated_webp(), LEFT_RED),
    "rgba webp": (images.webp(Image.new("RGBA", images.SIZE, (255, 0, 0, 128))), (255, 127, 127)),
    "gif": (images.animated_gif(), LEFT_RED),
    "clear gif": (
        images.encode(Image.new("P", images.SIZE, 0), "GIF", transparency=0),
        grey(255),
    ),
    "tiff": (images.tiff(), LEFT_RED),
    "lzw tiff": (images.tiff(compression="tiff_lzw"), LEFT_RED),
    "jpeg tiff": (images.tiff(compression="jpeg", quality=95), LEFT_RED),
    "bilevel tiff": (images.tiff(Image.new("1", images.SIZE, 1), compression="group4"), grey(255)),
    "grey alpha tiff": (images.tiff(Image.new("LA", images.SIZE, (0, 128))), grey(127)),
    "palette tiff": (images.tiff(images.flat().quantize(4)), LEFT_RED),
    "cmyk tiff": (images.tiff(Image.new("CMYK", images.SIZE, (0, 200, 100, 40))), (215, 46, 131)),
    "ycbcr tiff": (images.tiff(Image.new("YCbCr", images.SIZE, (90, 128, 128))), grey(90)),
    "16-bit tiff": (images.tiff(Image.new("I;16", images.SIZE, 0x8034)), grey(0x80)),
    "big-endian 16-bit tiff": (images.tiff(Image.new("I;16B", images.SIZE, 0x8034)), grey(0x80)),
    "white-is-zero 16-bit tiff": (images.white_is_zero_tiff16(0x8034), grey(0x7F)),
    "32-bit tiff of 16-bit levels": (images.tiff(Image.new("I", images.SIZE, 0x8034)), grey(0x80)),
    "bmp": (images.bmp(), LEFT_RED),
    "bilevel bmp": (images.bmp(Image.new("1", images.SIZE, 1)), grey(255)),
    "palette bmp": (images.bmp(images.flat().quantize(4)), LEFT_RED),
}


@pytest.mark.parametrize("name", COLORS)
def test_colors(name: str) -> None:
    encoded, expected = COLORS[name]
    lossless = not any(word in name for word in ("jpeg", "mpo"))
    np.testing.assert_allclose(center_color(encoded), expected, atol=0 if lossless else 2)
    pixels = decode_pixels(encoded, preprocessing=CLIP, limits=LIMITS)
    assert pixels.shape == (224, 224, 3)


def test_half_transparent_palette_entry_is_over_white() -> None:
    image = rgb_image(images.palette_png_with_transparency(), limits=LIMITS)
    assert image.getpixel((image.width - 1, 0)) == grey(127)


def test_16_bit_range_is_kept_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    image = rgb_image(images.png(Image.fromarray(ramp)), limits=LIMITS)
    np.testing.assert_array_equal(np.asarray(image)[0, :, 1], np.arange(256))


# --- EXIF orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "make",
    [
        images.exif_rotated_jpeg,
        images.exif_rotated_png,
        images.exif_rotated_webp,
        images.exif_rotated_tiff,
    ],
)
def test_exif_orientation_is_applied(make: Any, orientation: int) -> None:
    image = rgb_image(make(orientation), limits=LIMITS)
    expected = images.four_corners()
    assert image.size == expected.size
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected))
    assert difference.max() <= (3 if make is images.exif_rotated_jpeg else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_meaningless_orientation_is_ignored(orientation: int) -> None:
    image = rgb_image(images.exif_rotated_jpeg(orientation), limits=LIMITS)
    assert image.size == images.four_corners().size


def test_damaged_exif_does_not_reject() -> None:
    encoded = images.exif_rotated_jpeg(6)
    start = encoded.index(b"Exif\0\0") + 6
    for damage in (b"\xff" * 16, b"MM\0\x2a\xff\xff\xff\xff", b"II\x2a\0\x08\0\0\0\xff\xff"):
        damaged = encoded[:start] + damage + encoded[start + len(damage) :]
        assert rgb_image(damaged, limits=LIMITS).size in {(96, 64), (64, 96)}


# --- Reduced decoding of large JPEGs ---


def exact(encoded: bytes, config: Preprocessing, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "JPEG_DRAFT_MARGIN", 1e6)
        return decode_pixels(encoded, preprocessing=config, limits=LIMITS).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("processor", ["CLIPImageProcessor", "SiglipImageProcessor"])
def test_reduced_decoding_matches_the_exact_path(
    orientation: int, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Odd sides, so that the reduced image covers more than the full one at one edge of each pair.
    image = images.photo(311, 203).resize((2801, 1827), Image.Resampling.BICUBIC)
    encoded = images.exif_rotated_jpeg(orientation, image)
    config = preprocessing_from_config({"image_processor_type": processor}, image_size=224)
    pixels = decode_pixels(encoded, preprocessing=config, limits=LIMITS).astype(int)
    difference = np.abs(pixels - exact(encoded, config, monkeypatch))
    assert difference.max() > 0
    assert difference.mean() < 0.6


def test_reduced_decoding_keeps_the_margin() -> None:
    margin = preprocess.JPEG_DRAFT_MARGIN
    for width, height in ((3000, 2000), (2000, 3000), (1200, 900), (900, 900), (450, 450)):
        with preprocess.jpeg_factory(
            io.BytesIO(images.jpeg(images.flat(size=(width, height))))
        ) as image:
            assert isinstance(image, preprocess.JpegImageFile)
            preprocess._draft(image, CLIP, sideways=False)
            assert min(image.size) >= min(224 * margin, min(width, height))
            assert min(image.size) < 2 * 224 * margin + 1


def test_no_resize_means_no_reduced_decoding() -> None:
    config = dataclasses.replace(CLIP, resize=None)
    image = images.photo(1200, 900)
    encoded = images.jpeg(image)
    pixels = decode_pixels(encoded, preprocessing=config, limits=LIMITS)
    full = np.asarray(rgb_image(encoded, limits=LIMITS))
    np.testing.assert_array_equal(pixels, full[338:562, 488:712])


def test_large_mpo_and_cmyk_are_decoded_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = images.photo(300, 200).resize((2400, 1600))
    for encoded in (
        images.encode(photo, "MPO", save_all=True, append_images=[photo.rotate(180)]),
        images.encode(photo.convert("CMYK"), "JPEG", quality=95),
    ):
        pixels = decode_pixels(encoded, preprocessing=CLIP, limits=LIMITS).astype(int)
        difference = np.abs(pixels - exact(encoded, CLIP, monkeypatch))
        assert 0 < difference.mean() < 1


# --- Rejects ---

GIF_HEADER_ONLY = b"GIF89a\x10\x00\x10\x00\x00\x00\x00"
REJECTS: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "empty_image"),
    "text": (images.text_file(), "not_an_image"),
    "zeros": (bytes(1000), "not_an_image"),
    "two bytes of a jpeg": (b"\xff\xd8", "not_an_image"),
    "text that starts like bmp": (b"BMW makes cars, and this is a text about them", "not_an_image"),
    "half a jpeg": (images.truncated_jpeg(), "truncated_image"),
    "jpeg header": (images.jpeg()[:100], "truncated_image"),
    "jpeg signature": (b"\xff\xd8\xff", "truncated_image"),
    "half a png": (images.png(images.photo(60, 40))[:3000], "truncated_image"),
    "half a webp": (images.webp(images.photo(60, 40))[:1000], "truncated_image"),
    "gif header": (GIF_HEADER_ONLY, "truncated_image"),
    "half a bmp": (images.bmp()[:1000], "truncated_image"),
    "half a tiff": (images.tiff()[:1000], "truncated_image"),
    "png of no width": (
        images.png_chunks(struct.pack(">IIBBBBB", 0, 8, 8, 0, 0, 0, 0), rows=b""),
        "truncated_image",
    ),
    "float tiff": (images.tiff(Image.new("F", images.SIZE, 0.5)), "unsupported_image"),
    "lab tiff": (images.tiff(Image.new("LAB", images.SIZE)), "unsupported_image"),
    "32-bit tiff": (images.tiff(Image.new("I", images.SIZE, 1 << 20)), "unsupported_image"),
    "signed tiff": (images.tiff(Image.new("I", images.SIZE, -5)), "unsupported_image"),
    "unknown tiff": (
        images.tiff().replace(
            struct.pack("<HHIHH", 262, 3, 1, 2, 0), struct.pack("<HHIHH", 262, 3, 1, 99, 0)
        ),
        "unsupported_image",
    ),
    "bmp of 7 bits": (images.bmp()[:28] + b"\x07" + images.bmp()[29:], "unsupported_image"),
    "avif": (b"\0\0\0\x20ftypavif\0\0\0\0mif1miaf", "unsupported_image"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported_image"),
    "jpeg xl": (b"\xff\x0a\xfa\x7f\x01", "unsupported_image"),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "unsupported_image"),
    "icon": (b"\0\0\1\0\1\0\x10\x10", "unsupported_image"),
    "photoshop": (b"8BPS\0\1\0\0\0\0", "unsupported_image"),
    "pdf": (b"%PDF-1.7\n", "unsupported_image"),
    "svg": (b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns="x"/>', "unsupported_image"),
}


@pytest.mark.parametrize("name", REJECTS)
def test_rejects(name: str) -> None:
    encoded, reason = REJECTS[name]
    assert reject_of(encoded).reason == reason


def test_reasons_are_the_closed_set() -> None:
    assert {reason for _, reason in REJECTS.values()} | {"image_too_large"} == REASONS


@pytest.mark.parametrize("cut", [0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_cut_jpeg_is_rejected_not_filled_with_grey(cut: float, progressive: bool) -> None:
    encoded = images.jpeg(images.photo(900, 700), progressive=progressive)
    assert reject_of(encoded[: int(cut * len(encoded))]).reason == "truncated_image"


def test_an_exception_can_be_pickled_and_reads_well() -> None:
    error = pickle.loads(pickle.dumps(ImageRejected("not_an_image", "x" * 1000)))
    assert isinstance(error, ImageRejected)
    assert (error.reason, error.detail) == ("not_an_image", "x" * 200)
    assert str(error).startswith("not_an_image: xxx")
    assert isinstance(error, ValueError)


def test_too_many_bytes() -> None:
    encoded = images.png()
    limits = ImageLimits(max_image_bytes=len(encoded) - 1)
    error = reject_of(encoded, limits=limits)
    assert error.reason == "image_too_large"
    assert str(len(encoded)) in error.detail
    decode_pixels(encoded, preprocessing=CLIP, limits=ImageLimits(max_image_bytes=len(encoded)))


def test_too_many_pixels() -> None:
    width, height = images.SIZE
    for make in images.VALID.values():
        encoded = make()
        error = reject_of(encoded, limits=ImageLimits(max_image_pixels=10))
        assert error.reason == "image_too_large"
        assert "max_image_pixels is 10" in error.detail
    decode_pixels(
        images.png(), preprocessing=CLIP, limits=ImageLimits(max_image_pixels=width * height)
    )


def test_a_bomb_is_rejected_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = images.png_bomb()
    assert len(bomb) < 2 * 2**20

    def load(self: object) -> None:
        raise AssertionError("decoded before the size was checked")

    monkeypatch.setattr(preprocess.ImageFile, "load", load)
    error = reject_of(bomb)
    assert error.reason == "image_too_large"
    assert "30000x30000" in error.detail


def test_an_image_between_pillows_limit_and_ours_is_decoded_without_a_warning() -> None:
    # 90 million pixels: Pillow would warn. Bilevel, to stay cheap.
    encoded = images.png(Image.new("1", (9500, 9500), 1))
    config = dataclasses.replace(CLIP, resize=None)
    assert decode_pixels(encoded, preprocessing=config, limits=LIMITS).min() == 255


def test_pillows_own_limit_is_a_reject_too() -> None:
    # A WebP canvas of 16,777,216 x 1024 pixels: Pillow refuses it before we see a size.
    canvas = b"\xff\xff\xff" + (1023).to_bytes(3, "little")
    encoded = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + canvas
    limits = ImageLimits(max_image_pixels=10**12)
    assert reject_of(encoded, limits=limits).reason == "image_too_large"


def test_a_side_beyond_what_pillow_can_resize() -> None:
    assert reject_of(images.png(Image.new("1", (2**24 + 1, 1)))).reason == "image_too_large"


@pytest.mark.parametrize("name", ["max_image_bytes", "max_image_pixels"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_limits_are_validated(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        ImageLimits(**{name: value})


# --- Any bytes whatsoever ---


def decode_or_reject(encoded: bytes) -> None:
    limits = ImageLimits(max_image_pixels=1_000_000)
    for config in (CLIP, dataclasses.replace(CLIP, resize=None)):
        try:
            pixels = decode_pixels(encoded, preprocessing=config, limits=limits)
        except ImageRejected as error:
            check_reject(error)
        else:
            assert pixels.shape == (224, 224, 3)


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_random_bytes_never_raise_anything_else(encoded: bytes) -> None:
    decode_or_reject(encoded)


SIGNATURES = [make()[:24] for make in images.VALID.values()]


@given(st.sampled_from(SIGNATURES), st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_random_bytes_behind_a_signature_never_raise_anything_else(
    signature: bytes, rest: bytes
) -> None:
    decode_or_reject(signature + rest)


VALID = [make() for make in images.VALID.values()]


@given(st.sampled_from(VALID), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_truncations_never_raise_anything_else(encoded: bytes, cut: float) -> None:
    decode_or_reject(encoded[: int(cut * len(encoded))])


@given(
    st.sampled_from(VALID),
    # Mostly headers, where the parsers are.
    st.lists(
        st.tuples(st.integers(0, 400) | st.integers(0, 20_000), st.binary(min_size=1, max_size=4))
    ),
)
@settings(max_examples=300, deadline=None)
def test_corruptions_never_raise_anything_else(
    encoded: bytes, patches: list[tuple[int, bytes]]
) -> None:
    damaged = bytearray(encoded)
    for position, patch in patches:
        start = position % len(damaged)
        damaged[start : start + len(patch)] = patch
    decode_or_reject(bytes(damaged))


def test_threads_decode_the_same_pixels() -> None:
    encoded = [make() for make in images.VALID.values()]
    expected = [decode_pixels(one, preprocessing=CLIP, limits=LIMITS) for one in encoded]
    results: list[list[np.ndarray]] = [[] for _ in range(4)]

    def decode_all(into: list[np.ndarray]) -> None:
        into.extend(decode_pixels(one, preprocessing=CLIP, limits=LIMITS) for one in encoded)

    threads = [threading.Thread(target=decode_all, args=(result,)) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        for pixels, wanted in zip(result, expected, strict=True):
            np.testing.assert_array_equal(pixels, wanted)


# --- preprocessor_config.json ---

HALF = (0.5, 0.5, 0.5)
CONFIGS: dict[str, tuple[Mapping[str, object], int, Mapping[str, object]]] = {
    "clip, nothing else": (CLIP_CONFIG, 224, {"resize": 224, "crop": (224, 224), "resample": 3}),
    "openai clip of 2021": (
        {
            "crop_size": 336,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 336,
        },
        336,
        {"resize": 336, "crop": (336, 336), "rescale_factor": 1 / 255, "mean": CLIP.mean},
    ),
    "clip fast": (
        {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 224}},
        224,
        {"resize": 224, "crop": (224, 224)},
    ),
    "clip pil": ({"image_processor_type": "CLIPImageProcessorPil"}, 224, {"resize": 224}),
    "nulls": (
        {**CLIP_CONFIG, "size": None, "crop_size": None, "do_pad": None, "image_mean": None},
        224,
        {"resize": 224, "crop": (224, 224), "mean": CLIP.mean},
    ),
    "chinese clip": (
        {
            "image_processor_type": "ChineseCLIPFeatureExtractor",
            "size": {"height": 224, "width": 224},
        },
        224,
        {"resize": (224, 224), "crop": (224, 224)},
    ),
    "clip to an exact size": (
        {**CLIP_CONFIG, "size": {"height": 224, "width": 224}, "do_center_crop": False},
        224,
        {"resize": (224, 224), "crop": None},
    ),
    "list size": (
        {**CLIP_CONFIG, "size": [224, 224], "do_center_crop": False},
        224,
        {"resize": (224, 224)},
    ),
    "siglip": (
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}},
        384,
        {"resize": (384, 384), "crop": None, "resample": 3, "mean": HALF, "std": HALF},
    ),
    "vit": (
        {"image_processor_type": "ViTImageProcessor"},
        224,
        {"resize": (224, 224), "crop": None, "resample": 2, "mean": HALF, "std": HALF},
    ),
    "vit of 2021": (
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "resample": 2},
        384,
        {"resize": (384, 384), "crop": None},
    ),
    "dinov2": (
        {
            "image_processor_type": "BitImageProcessor",
            "crop_size": {"height": 224, "width": 224},
            "size": {"shortest_edge": 256},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        224,
        {"resize": 256, "crop": (224, 224), "mean": (0.485, 0.456, 0.406)},
    ),
    "no resize": ({**CLIP_CONFIG, "do_resize": False}, 224, {"resize": None}),
    "no normalise": (
        {**CLIP_CONFIG, "do_normalize": False},
        224,
        {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "rescale_factor": 1 / 255},
    ),
    "no rescale": ({**CLIP_CONFIG, "do_rescale": False}, 224, {"rescale_factor": 1.0}),
    "one mean": ({**CLIP_CONFIG, "image_mean": 0.5}, 224, {"mean": HALF}),
    "other factor": (
        {**CLIP_CONFIG, "rescale_factor": 1 / 127.5},
        224,
        {"rescale_factor": 1 / 127.5},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name: str) -> None:
    config, image_size, expected = CONFIGS[name]
    parsed = preprocessing_from_config(config, image_size=image_size)
    assert (parsed.height, parsed.width) == (image_size, image_size)
    assert {field: getattr(parsed, field) for field in expected} == dict(expected)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_defaults_are_those_of_transformers(processor: str) -> None:
    reference = PROCESSORS[processor]()
    parsed = preprocessing_from_config({"image_processor_type": processor}, image_size=224)
    assert parsed.resample == reference.resample
    assert parsed.mean == tuple(reference.image_mean)
    assert parsed.std == tuple(reference.image_std)
    assert parsed.rescale_factor == reference.rescale_factor
    assert (parsed.crop is not None) == bool(reference.do_center_crop)


MALFORMED: list[tuple[Mapping[str, object], str]] = [
    ({}, "image_processor_type=None"),
    ({"image_processor_type": "BlipImageProcessor"}, "image_processor_type='BlipImageProcessor'"),
    ({"image_processor_type": 3}, "image_processor_type=3"),
    ({"image_processor_type": "CLIP"}, "image_processor_type='CLIP'"),
    ({**CLIP_CONFIG, "size": {"longest_edge": 224}}, "size=.*expected"),
    ({**CLIP_CONFIG, "size": {"shortest_edge": 224, "longest_edge": 500}}, "size=.*expected"),
    ({**CLIP_CONFIG, "size": "224"}, "size='224'"),
    ({**CLIP_CONFIG, "size": 0}, "size=0"),
    ({**CLIP_CONFIG, "size": True}, "size=True"),
    ({**CLIP_CONFIG, "size": {"height": 224.5, "width": 224}}, "size=.*expected"),
    ({**CLIP_CONFIG, "size": [224]}, "size=.*expected"),
    ({**CLIP_CONFIG, "crop_size": {"shortest_edge": 224}}, "crop_size=.*expected"),
    ({**CLIP_CONFIG, "crop_size": -1}, "crop_size=-1"),
    ({**CLIP_CONFIG, "do_center_crop": False}, "do_center_crop=False.*different sizes"),
    ({**CLIP_CONFIG, "do_center_crop": False, "do_resize": False}, "different sizes"),
    ({**CLIP_CONFIG, "do_resize": "yes"}, "do_resize='yes'.*true or false"),
    ({**CLIP_CONFIG, "do_rescale": 1}, "do_rescale=1"),
    ({**CLIP_CONFIG, "do_pad": True}, "do_pad=True"),
    ({**CLIP_CONFIG, "resample": 9}, "resample=9"),
    ({**CLIP_CONFIG, "resample": "bicubic"}, "resample='bicubic'"),
    ({**CLIP_CONFIG, "rescale_factor": 0}, "rescale_factor=0"),
    ({**CLIP_CONFIG, "rescale_factor": "1/255"}, "rescale_factor='1/255'"),
    ({**CLIP_CONFIG, "image_mean": [0.5, 0.5]}, "image_mean=.*three numbers"),
    ({**CLIP_CONFIG, "image_mean": ["a", "b", "c"]}, "image_mean=.*three numbers"),
    ({**CLIP_CONFIG, "image_std": [0.0, 1.0, 1.0]}, "std=.*above 0"),
    ({**CLIP_CONFIG, "image_std": [float("nan"), 1.0, 1.0]}, "std=.*finite"),
    ({"image_processor_type": "SiglipImageProcessor", "size": 224}, "different sizes"),
    ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, "crop_size=None"),
]


@pytest.mark.parametrize(("config", "message"), MALFORMED, ids=str)
def test_malformed_config(config: Mapping[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessing_from_config(config, image_size=224)


def test_an_output_of_another_size_than_the_model_takes_names_both() -> None:
    with pytest.raises(ValueError, match=r"224x224.*image_size is 336"):
        preprocessing_from_config(CLIP_CONFIG, image_size=336)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 225}, "height=225"),
        ({"resize": 0}, "resize=0"),
        ({"resize": (224, 0)}, r"resize=\(224, 0\)"),
        ({"crop": [224, 224]}, r"crop=\[224, 224\]"),
        ({"crop": None}, "different sizes"),
        ({"resample": True}, "resample=True"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean=.*tuple"),
        ({"std": (1.0, -1.0, 1.0)}, "std=.*above 0"),
        ({"rescale_factor": float("inf")}, "rescale_factor=inf"),
    ],
    ids=str,
)
def test_preprocessing_is_validated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLIP, **change)


def test_no_torch_is_imported() -> None:
    code = "import sys, engine.preprocess; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["False", "False"]
