"""Tests of engine/images.py: the colours a person sees, and a verdict on any bytes."""

import io
import pickle
import struct
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ImageFile import ImageFile

from engine.images import REASONS, ImageLimits, ImageRejected, image_size, rgb_image
from tests import image_files

LIMITS = ImageLimits()


def reject_of(encoded: bytes, *, limits: ImageLimits = LIMITS) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        rgb_image(encoded, limits=limits)
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


# --- Formats and modes: the colours a person sees ---


def grey(level: int) -> tuple[int, int, int]:
    return (level, level, level)


LEFT_RED = image_files.RED
COLORS: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "jpeg": (image_files.jpeg(), LEFT_RED),
    "progressive jpeg": (image_files.jpeg(progressive=True), LEFT_RED),
    "grey jpeg": (image_files.jpeg(Image.new("L", image_files.SIZE, 90)), grey(90)),
    "mpo": (image_files.mpo(), LEFT_RED),
    "cmyk jpeg": (image_files.cmyk_jpeg(), (215, 46, 131)),
    "ycck jpeg": (image_files.ycck_jpeg(), (215, 46, 131)),
    "png": (image_files.png(), LEFT_RED),
    "black and white png": (image_files.png(Image.new("1", image_files.SIZE, 1)), grey(255)),
    "grey png": (image_files.png(Image.new("L", image_files.SIZE, 90)), grey(90)),
    "grey alpha png": (image_files.png(Image.new("LA", image_files.SIZE, (0, 128))), grey(127)),
    "rgba png": (
        image_files.png(Image.new("RGBA", image_files.SIZE, (255, 0, 0, 128))),
        (255, 127, 127),
    ),
    "clear png": (image_files.png(Image.new("RGBA", image_files.SIZE, (0, 0, 0, 0))), grey(255)),
    "palette png": (image_files.png(image_files.flat().quantize(4)), LEFT_RED),
    "palette png with alpha": (image_files.palette_png_with_transparency(), LEFT_RED),
    "grey png with a clear level": (
        image_files.png(Image.new("L", image_files.SIZE, 90), transparency=90),
        grey(255),
    ),
    "rgb png with a clear colour": (image_files.png(transparency=image_files.RED), grey(255)),
    "bilevel png with clear black": (
        image_files.png(Image.new("1", image_files.SIZE, 0), transparency=0),
        grey(255),
    ),
    "2-bit png": (image_files.small_grey_png(2, 1), grey(85)),
    "2-bit png with a clear level": (image_files.small_grey_png(2, 1, transparent=1), grey(255)),
    "4-bit png with a clear level": (image_files.small_grey_png(4, 5, transparent=5), grey(255)),
    "4-bit png with another clear level": (
        image_files.small_grey_png(4, 5, transparent=4),
        grey(85),
    ),
    "16-bit grey png": (image_files.png16((0x8034,)), grey(0x80)),
    "dark 16-bit grey png": (image_files.png16((300,)), grey(1)),
    "white 16-bit grey png": (image_files.png16((0xFFFF,)), grey(255)),
    "16-bit grey png, clear": (image_files.png16((0x8034,), transparent=(0x8034,)), grey(255)),
    "16-bit grey png, not clear": (image_files.png16((0x8034,), transparent=(0x8035,)), grey(0x80)),
    "16-bit grey alpha png": (image_files.png16((0, 0x8000)), grey(127)),
    "16-bit rgb png": (image_files.png16((0xC8FF, 0x1E00, 0x2800)), LEFT_RED),
    "16-bit rgb png, clear": (
        image_files.png16((0xC8FF, 0x1E00, 0x2800), transparent=(0xC8FF, 0x1E00, 0x2800)),
        grey(255),
    ),
    "16-bit rgba png": (image_files.png16((0xFFFF, 0, 0, 0x8000)), (255, 127, 127)),
    "webp": (image_files.webp(), LEFT_RED),
    "animated webp": (image_files.animated_webp(), LEFT_RED),
    "rgba webp": (
        image_files.webp(Image.new("RGBA", image_files.SIZE, (255, 0, 0, 128))),
        (255, 127, 127),
    ),
    "gif": (image_files.animated_gif(), LEFT_RED),
    "clear gif": (
        image_files.encode(Image.new("P", image_files.SIZE, 0), "GIF", transparency=0),
        grey(255),
    ),
    "tiff": (image_files.tiff(), LEFT_RED),
    "lzw tiff": (image_files.tiff(compression="tiff_lzw"), LEFT_RED),
    "jpeg tiff": (image_files.tiff(compression="jpeg", quality=95), LEFT_RED),
    "bilevel tiff": (
        image_files.tiff(Image.new("1", image_files.SIZE, 1), compression="group4"),
        grey(255),
    ),
    "grey alpha tiff": (image_files.tiff(Image.new("LA", image_files.SIZE, (0, 128))), grey(127)),
    "palette tiff": (image_files.tiff(image_files.flat().quantize(4)), LEFT_RED),
    "cmyk tiff": (
        image_files.tiff(Image.new("CMYK", image_files.SIZE, (0, 200, 100, 40))),
        (215, 46, 131),
    ),
    "ycbcr tiff": (
        image_files.tiff(Image.new("YCbCr", image_files.SIZE, (90, 128, 128))),
        grey(90),
    ),
    "16-bit tiff": (image_files.tiff(Image.new("I;16", image_files.SIZE, 0x8034)), grey(0x80)),
    "big-endian 16-bit tiff": (
        image_files.tiff(Image.new("I;16B", image_files.SIZE, 0x8034)),
        grey(0x80),
    ),
    "white-is-zero 16-bit tiff": (image_files.white_is_zero_tiff16(0x8034), grey(0x7F)),
    "32-bit tiff of 16-bit levels": (
        image_files.tiff(Image.new("I", image_files.SIZE, 0x8034)),
        grey(0x80),
    ),
    "bmp": (image_files.bmp(), LEFT_RED),
    "bilevel bmp": (image_files.bmp(Image.new("1", image_files.SIZE, 1)), grey(255)),
    "palette bmp": (image_files.bmp(image_files.flat().quantize(4)), LEFT_RED),
}


@pytest.mark.parametrize("name", COLORS)
def test_colors(name: str) -> None:
    encoded, expected = COLORS[name]
    lossless = not any(word in name for word in ("jpeg", "mpo"))
    np.testing.assert_allclose(center_color(encoded), expected, atol=0 if lossless else 2)


def test_half_transparent_palette_entry_is_over_white() -> None:
    image = rgb_image(image_files.palette_png_with_transparency(), limits=LIMITS)
    assert image.getpixel((image.width - 1, 0)) == grey(127)


def test_16_bit_range_is_kept_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    image = rgb_image(image_files.png(Image.fromarray(ramp)), limits=LIMITS)
    np.testing.assert_array_equal(np.asarray(image)[0, :, 1], np.arange(256))


# --- EXIF orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "make",
    [
        image_files.exif_rotated_jpeg,
        image_files.exif_rotated_png,
        image_files.exif_rotated_webp,
        image_files.exif_rotated_tiff,
    ],
)
def test_exif_orientation_is_applied(make: Any, orientation: int) -> None:
    image = rgb_image(make(orientation), limits=LIMITS)
    expected = image_files.four_corners()
    assert image.size == expected.size
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected))
    assert difference.max() <= (3 if make is image_files.exif_rotated_jpeg else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_meaningless_orientation_is_ignored(orientation: int) -> None:
    image = rgb_image(image_files.exif_rotated_jpeg(orientation), limits=LIMITS)
    assert image.size == image_files.four_corners().size


def test_damaged_exif_does_not_reject() -> None:
    encoded = image_files.exif_rotated_jpeg(6)
    start = encoded.index(b"Exif\0\0") + 6
    for damage in (b"\xff" * 16, b"MM\0\x2a\xff\xff\xff\xff", b"II\x2a\0\x08\0\0\0\xff\xff"):
        damaged = encoded[:start] + damage + encoded[start + len(damage) :]
        assert rgb_image(damaged, limits=LIMITS).size in {(96, 64), (64, 96)}


# --- Rejects ---

GIF_HEADER_ONLY = b"GIF89a\x10\x00\x10\x00\x00\x00\x00"
REJECTS: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "empty_image"),
    "text": (image_files.text_file(), "not_an_image"),
    "zeros": (bytes(1000), "not_an_image"),
    "two bytes of a jpeg": (b"\xff\xd8", "not_an_image"),
    "text that starts like bmp": (b"BMW makes cars, and this is a text about them", "not_an_image"),
    "half a jpeg": (image_files.truncated_jpeg(), "truncated_image"),
    "jpeg header": (image_files.jpeg()[:100], "truncated_image"),
    "jpeg signature": (b"\xff\xd8\xff", "truncated_image"),
    "half a png": (image_files.png(image_files.photo(60, 40))[:3000], "truncated_image"),
    "half a webp": (image_files.webp(image_files.photo(60, 40))[:1000], "truncated_image"),
    "gif header": (GIF_HEADER_ONLY, "truncated_image"),
    "half a bmp": (image_files.bmp()[:1000], "truncated_image"),
    "half a tiff": (image_files.tiff()[:1000], "truncated_image"),
    "png of no width": (
        image_files.png_chunks(struct.pack(">IIBBBBB", 0, 8, 8, 0, 0, 0, 0), rows=b""),
        "truncated_image",
    ),
    "float tiff": (image_files.tiff(Image.new("F", image_files.SIZE, 0.5)), "unsupported_image"),
    "lab tiff": (image_files.tiff(Image.new("LAB", image_files.SIZE)), "unsupported_image"),
    "32-bit tiff": (
        image_files.tiff(Image.new("I", image_files.SIZE, 1 << 20)),
        "unsupported_image",
    ),
    "signed tiff": (image_files.tiff(Image.new("I", image_files.SIZE, -5)), "unsupported_image"),
    "unknown tiff": (
        image_files.tiff().replace(
            struct.pack("<HHIHH", 262, 3, 1, 2, 0), struct.pack("<HHIHH", 262, 3, 1, 99, 0)
        ),
        "unsupported_image",
    ),
    "bmp of 7 bits": (
        image_files.bmp()[:28] + b"\x07" + image_files.bmp()[29:],
        "unsupported_image",
    ),
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
    encoded = image_files.jpeg(image_files.photo(900, 700), progressive=progressive)
    assert reject_of(encoded[: int(cut * len(encoded))]).reason == "truncated_image"


def test_an_exception_can_be_pickled_and_reads_well() -> None:
    error = pickle.loads(pickle.dumps(ImageRejected("not_an_image", "x" * 1000)))
    assert isinstance(error, ImageRejected)
    assert (error.reason, error.detail) == ("not_an_image", "x" * 200)
    assert str(error).startswith("not_an_image: xxx")
    assert isinstance(error, ValueError)


def test_too_many_bytes() -> None:
    encoded = image_files.png()
    limits = ImageLimits(max_image_bytes=len(encoded) - 1)
    error = reject_of(encoded, limits=limits)
    assert error.reason == "image_too_large"
    assert str(len(encoded)) in error.detail
    rgb_image(encoded, limits=ImageLimits(max_image_bytes=len(encoded)))


def test_too_many_pixels() -> None:
    width, height = image_files.SIZE
    for make in image_files.VALID.values():
        encoded = make()
        error = reject_of(encoded, limits=ImageLimits(max_image_pixels=10))
        assert error.reason == "image_too_large"
        assert "max_image_pixels is 10" in error.detail
    rgb_image(image_files.png(), limits=ImageLimits(max_image_pixels=width * height))


def test_the_size_is_known_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "PNG")
    encoded = buffer.getvalue()
    monkeypatch.setattr(ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(encoded, limits=ImageLimits()) == (40, 30)
    with pytest.raises(ImageRejected, match="max_image_pixels is 1199"):
        image_size(encoded, limits=ImageLimits(max_image_pixels=1199))
    with pytest.raises(ImageRejected, match="not_an_image"):
        image_size(b"no picture", limits=ImageLimits())


def test_a_bomb_is_rejected_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = image_files.png_bomb()
    assert len(bomb) < 2 * 2**20

    def load(self: object) -> None:
        raise AssertionError("decoded before the size was checked")

    monkeypatch.setattr(ImageFile, "load", load)
    error = reject_of(bomb)
    assert error.reason == "image_too_large"
    assert "30000x30000" in error.detail


def test_an_image_between_pillows_limit_and_ours_is_decoded_without_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    width, height = image_files.SIZE
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", width * height - 1)
    assert rgb_image(image_files.png(), limits=LIMITS).size == image_files.SIZE


def test_pillows_own_limit_is_a_reject_too() -> None:
    # A WebP canvas of 16,777,216 x 1024 pixels: Pillow refuses it before we see a size.
    canvas = b"\xff\xff\xff" + (1023).to_bytes(3, "little")
    encoded = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + canvas
    limits = ImageLimits(max_image_pixels=10**12)
    assert reject_of(encoded, limits=limits).reason == "image_too_large"


def test_a_side_beyond_what_pillow_can_resize() -> None:
    assert reject_of(image_files.png(Image.new("1", (2**24 + 1, 1)))).reason == "image_too_large"


@pytest.mark.parametrize("name", ["max_image_bytes", "max_image_pixels"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_limits_are_validated(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        ImageLimits(**{name: value})


# --- Any bytes whatsoever ---


def decode_or_reject(encoded: bytes) -> None:
    limits = ImageLimits(max_image_pixels=1_000_000)
    try:
        image = rgb_image(encoded, limits=limits)
    except ImageRejected as error:
        check_reject(error)
    else:
        assert image.mode == "RGB"
        assert min(image.size) > 0


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_random_bytes_never_raise_anything_else(encoded: bytes) -> None:
    decode_or_reject(encoded)


SIGNATURES = [make()[:24] for make in image_files.VALID.values()]


@given(st.sampled_from(SIGNATURES), st.binary(max_size=300))
@settings(max_examples=100)
def test_random_bytes_behind_a_signature_never_raise_anything_else(
    signature: bytes, rest: bytes
) -> None:
    decode_or_reject(signature + rest)


VALID = [make() for make in image_files.VALID.values()]


@given(st.sampled_from(VALID), st.floats(0, 1))
@settings(max_examples=100)
def test_truncations_never_raise_anything_else(encoded: bytes, cut: float) -> None:
    decode_or_reject(encoded[: int(cut * len(encoded))])


@given(st.sampled_from(VALID), image_files.PATCHES)
@settings(max_examples=200)
def test_damage_never_raises_anything_else(
    encoded: bytes, patches: list[tuple[int, bytes]]
) -> None:
    decode_or_reject(image_files.patched(encoded, patches))


def test_threads_decode_the_same_images() -> None:
    encoded = [make() for make in image_files.VALID.values()]
    expected = [np.asarray(rgb_image(one, limits=LIMITS)) for one in encoded]
    results: list[list[np.ndarray]] = [[] for _ in range(4)]

    def decode_all(into: list[np.ndarray]) -> None:
        into.extend(np.asarray(rgb_image(one, limits=LIMITS)) for one in encoded)

    threads = [threading.Thread(target=decode_all, args=(result,)) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        for pixels, wanted in zip(result, expected, strict=True):
            np.testing.assert_array_equal(pixels, wanted)
