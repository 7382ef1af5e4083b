"""Turns encoded image bytes into an upright RGB image, or says why they are none.

Knows nothing of models; colour profiles are ignored.
"""

import io
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile, jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from engine.truncation import has_missing_rows, strip_end_marker

RejectReason = Literal[
    "empty_image", "not_an_image", "truncated_image", "image_too_large", "unsupported_image"
]
REASONS: frozenset[str] = frozenset(get_args(RejectReason))
"""Why bytes are no usable image; a damaged image of a supported format is `truncated_image`."""

_Result = TypeVar("_Result")
Size = tuple[int, int]
"""(width, height) in pixels."""

# Pillow holds a resize box in float32, which counts every pixel only up to here.
_MAX_SIDE_PIXELS = 2**24
_MAX_DETAIL_CHARACTERS = 200

_OPENERS: tuple[tuple[re.Pattern[bytes], str, Callable[[io.BytesIO], ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG", jpeg_factory),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG", PngImageFile),
    (re.compile(rb"RIFF.{4}WEBPVP8[ LX]", re.DOTALL), "WebP", WebPImageFile),
    (re.compile(rb"GIF8[79]a"), "GIF", GifImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF", TiffImageFile),
    (re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), "BMP", BmpImageFile),
)
_UNSUPPORTED_FORMATS = (
    (re.compile(rb".{4}ftyp(?:avi[fs]|he[iv][cmsx]|mif1|msf1)", re.DOTALL), "AVIF or HEIC"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "), "JPEG 2000"),
    (re.compile(rb"8BPS"), "Photoshop"),
    (re.compile(rb"\x00\x00\x01\x00"), "ICO"),
    (re.compile(rb"%PDF-"), "PDF"),
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<![^>]*>\s*)*<svg\b"), "SVG"),
)
_MAX_SIGNATURE_BYTES = 1024
_UNUSUAL_KIND = ("unsupported", "unknown pixel mode", "unknown data organization")

_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

_OPAQUE_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"})
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_DEEP_GREY_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I"})

# EXIF 2.32, tag 0x0112: the transposition that shows an image upright.
_ORIENTATIONS: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's EXIF parser lets through on damaged bytes.
_EXIF_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)


class ImageRejected(ValueError):  # noqa: N818 - a verdict on a row, not a failure
    """Bytes that are no usable image; `reason` is one of REASONS, `detail` is for a person."""

    # Positional, because pickle rebuilds an exception from its positional arguments.
    def __init__(self, reason: RejectReason, detail: str) -> None:
        """Keep `detail` to 200 characters."""
        detail = detail[:_MAX_DETAIL_CHARACTERS]
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        """Return reason and detail in one line."""
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What one image may cost; checked before any pixel is decoded."""

    max_image_bytes: int = 64 * 2**20
    """Encoded bytes; 64 MiB is above any photo and below an archive that got into the column."""
    max_image_pixels: int = 100_000_000
    """Width times height; the largest phone photos have 200 million, product photos under 50.
    100 million take 0.4 GB as RGB and at most 1.7 GB while transparency is composited."""

    def __post_init__(self) -> None:
        """Raise ValueError for a limit below one."""
        for name in ("max_image_bytes", "max_image_pixels"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1")


def rgb_image(encoded: bytes | memoryview, *, limits: ImageLimits) -> Image.Image:
    """Decode one image: upright, mode RGB, transparency over white.

    Args:
        encoded: A JPEG, PNG, WebP, GIF, TIFF or BMP file; of several frames, the first counts.
        limits: Above these the image is rejected unseen.

    Raises:
        ImageRejected: The bytes are no usable image; nothing else is raised, whatever they are.
    """
    return _of_opened(encoded, _pixels, limits=limits)


def image_size(encoded: bytes | memoryview, *, limits: ImageLimits) -> Size:
    """Width and height as the header says, before it is turned upright; no pixel is decoded.

    Raises:
        ImageRejected: The bytes are no image, or one above the limits; nothing else is raised.
    """
    return _of_opened(encoded, lambda stream, image: image.size, limits=limits)


def _of_opened(
    encoded: bytes | memoryview,
    function: Callable[[io.BytesIO, ImageFile], _Result],
    *,
    limits: ImageLimits,
) -> _Result:
    """What a function makes of an image and its stream, the header read and the size checked."""
    num_bytes = memoryview(encoded).nbytes
    if num_bytes == 0:
        raise ImageRejected("empty_image", "0 bytes")
    if num_bytes > limits.max_image_bytes:
        raise ImageRejected(
            "image_too_large", f"{num_bytes} bytes; max_image_bytes is {limits.max_image_bytes}"
        )
    stream = io.BytesIO(encoded)
    format_name, opener = _identify(stream.read(_MAX_SIGNATURE_BYTES))
    stream.seek(0)
    # The one change of process-wide state: Pillow warns of a damaged header from deep inside, and
    # warnings.catch_warnings is not safe where several threads decode.
    if _PILLOW_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_WARNINGS[3].pattern)
    try:
        image = opener(stream)
        _check_size(image.size, limits=limits)
        return function(stream, image)
    except ImageRejected:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageRejected("image_too_large", f"{format_name}: {error or 'no memory'}") from error
    except Exception as error:  # Pillow's parsers raise almost any type on hostile bytes
        # Pillow has no exception type for a valid file of an unusual kind, only these words.
        unusual = str(error).lower().startswith(_UNUSUAL_KIND)
        raise ImageRejected(
            "unsupported_image" if unusual else "truncated_image",
            f"{format_name}: {error or type(error).__name__}",
        ) from error


def _pixels(stream: io.BytesIO, image: ImageFile) -> Image.Image:
    # Not a subclass: Pillow has moved on in the stream of a file with several frames.
    if type(image) is JpegImageFile:
        strip_end_marker(stream, image)
    upright = _load_upright(image)
    if isinstance(image, PngImageFile) and has_missing_rows(stream, image):
        raise ImageRejected("truncated_image", "PNG: fewer rows than its header says")
    return upright


def _identify(prefix: bytes) -> tuple[str, Callable[[io.BytesIO], ImageFile]]:
    for signature, name, opener in _OPENERS:
        if signature.match(prefix):
            return name, opener
    for signature, name in _UNSUPPORTED_FORMATS:
        if signature.match(prefix):
            raise ImageRejected(
                "unsupported_image", f"{name}; expected JPEG, PNG, WebP, GIF, TIFF or BMP"
            )
    raise ImageRejected("not_an_image", f"starts with {prefix[:16]!r}")


def _check_size(size: Size, *, limits: ImageLimits) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageRejected("truncated_image", f"{width}x{height} pixels")
    if width * height > limits.max_image_pixels:
        raise ImageRejected(
            "image_too_large",
            f"{width}x{height} pixels; max_image_pixels is {limits.max_image_pixels}",
        )
    if max(size) > _MAX_SIDE_PIXELS:
        raise ImageRejected(
            "image_too_large", f"{width}x{height} pixels; a side has {_MAX_SIDE_PIXELS} at most"
        )


def _load_upright(image: ImageFile) -> Image.Image:
    if isinstance(image, PngImageFile):
        _scale_transparent_color(image)
    image.load()
    # After the load: a PNG may hold its EXIF behind its pixels, a TIFF was turned by Pillow.
    orientation = _exif_orientation(image)
    rgb = _to_rgb(image)
    return rgb if orientation == 1 else rgb.transpose(_ORIENTATIONS[orientation])


def _exif_orientation(image: ImageFile) -> int:
    """Return 1 to 8, or 1 where EXIF is damaged: that spoils no pixel."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _EXIF_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) and orientation in _ORIENTATIONS else 1


def _scale_transparent_color(image: PngImageFile) -> None:
    """Bring a PNG's transparent colour to the 8 bits that Pillow scales its pixels to."""
    transparency = image.info.get("transparency")
    raw_mode = image.tile[0][3] if image.tile else None
    if isinstance(transparency, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in transparency)
    elif isinstance(transparency, int) and raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = transparency * (85 if raw_mode == "L;2" else 17)


def _to_rgb(image: ImageFile) -> Image.Image:
    if image.mode in _DEEP_GREY_MODES:
        return _grey_from_deep(image).convert("RGB")
    if image.mode not in _OPAQUE_MODES | _ALPHA_MODES:
        raise ImageRejected("unsupported_image", f"{image.format} with pixels of mode {image.mode}")
    transparency = image.info.get("transparency")
    if transparency is None and image.mode in _OPAQUE_MODES:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey_from_deep(image: ImageFile) -> Image.Image:
    """Keep the high 8 bits of deep grey, which is what Pillow does with 16-bit colour."""
    levels = np.asarray(image)
    num_bits = 16
    white_is_zero = False
    if isinstance(image, TiffImageFile):
        num_bits = min(16, image.tag_v2.get(BITSPERSAMPLE, (16,))[0])
        white_is_zero = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    if image.mode == "I" and (levels.min() < 0 or levels.max() >> num_bits):
        raise ImageRejected(
            "unsupported_image",
            f"{image.format} with grey levels {levels.min()} to {levels.max()}; expected 16 bits",
        )
    grey = (levels >> (num_bits - 8)).astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
    transparency = image.info.get("transparency")
    if isinstance(transparency, int):
        grey[levels == transparency] = 255
    return Image.fromarray(grey)
