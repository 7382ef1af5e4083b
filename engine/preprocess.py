"""Turns encoded image bytes into uint8 pixels: the one definition of decoding, resize and crop.

Knows no torch, Ray or Parquet, nor which model reads the pixels; colour profiles are ignored.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile, jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    TiffImageFile,
)
from PIL.WebPImagePlugin import WebPImageFile

RejectReason = Literal[
    "empty_image", "not_an_image", "truncated_image", "image_too_large", "unsupported_image"
]
REASONS: frozenset[str] = frozenset(get_args(RejectReason))
"""Why bytes are no usable image; a damaged image of a supported format is `truncated_image`."""

# Of 1, 1.5, 2 and 3 the smallest whose p1 cosine to exact decoding, over the photos it touches, is
# above 0.995: 0.978, 0.991, 0.998, 0.999. CLIP ViT-B/16 at 224, 100 Flickr8k photos enlarged 2 and
# 3 times (LANCZOS, JPEG quality 92), 2 cores of an AMD EPYC.
JPEG_DRAFT_MARGIN = 2.0
"""A JPEG is decoded at 1/2, 1/4 or 1/8 while it stays this many times larger than its target."""

_MAX_ORDINARY_ASPECT = 20
# Pillow holds a resize box in float32, which counts every pixel only up to here.
_MAX_SIDE_PIXELS = 2**24
_MAX_DETAIL_CHARACTERS = 200

_Size = tuple[int, int]
_Box = tuple[float, float, float, float]


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
            if not _is_positive_int(value):
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1")


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


# Defaults of transformers 5.23, image_processing_pil_*.py; `int_size` says what an integer means.
_CLIP_DEFAULTS: Mapping[str, object] = {
    "int_size": "shortest_edge",
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "do_pad": False,
}
_SIGLIP_DEFAULTS: Mapping[str, object] = {
    **_CLIP_DEFAULTS,
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "crop_size": None,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
_VIT_DEFAULTS: Mapping[str, object] = {**_SIGLIP_DEFAULTS, "int_size": "square", "resample": 2}
_PROCESSOR_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "CLIP": _CLIP_DEFAULTS,
    "ChineseCLIP": _CLIP_DEFAULTS,
    "Bit": _CLIP_DEFAULTS,
    "Siglip": _SIGLIP_DEFAULTS,
    "ViT": _VIT_DEFAULTS,
}
_PROCESSOR_TYPE = re.compile(r"(\w+?)(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)")


def preprocessing_from_config(config: Mapping[str, object], *, image_size: int) -> Preprocessing:
    """Read a checkpoint's `preprocessor_config.json`, as transformers' image processors do.

    Images always become RGB, whatever `do_convert_rgb` says. `do_rescale: false` gives a
    `rescale_factor` of 1, and `do_normalize: false` a mean of 0 and a std of 1.

    Args:
        config: The parsed JSON; keys that are missing or null take the processor's defaults.
        image_size: Height and width in pixels that the model takes.

    Returns:
        A preprocessing whose output is `image_size` pixels high and wide.

    Raises:
        ValueError: A field is malformed or unsupported, or the output is not `image_size`.
    """
    settings = {
        **_defaults_for(config),
        **{name: value for name, value in config.items() if value is not None},
    }
    flags = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
    resizes, crops, rescales, normalises, pads = (_flag(settings, name) for name in flags)
    if pads:
        raise ValueError("do_pad=True: expected false; padding to a size is not supported")
    resize = None
    if resizes:
        resize = _parse_size(settings, "size", int_means=str(settings["int_size"]))
    crop = _parse_size(settings, "crop_size", int_means="square") if crops else None
    if isinstance(crop, int):
        raise ValueError(
            f"crop_size={settings['crop_size']!r}: expected an integer or height and width"
        )
    output = crop or resize
    if not isinstance(output, tuple):
        raise ValueError(
            f"do_center_crop=False with do_resize={resizes} and size={settings['size']!r} leaves "
            "images of different sizes: expected a centre crop, or a size with height and width"
        )
    if output != (image_size, image_size):
        raise ValueError(
            f"preprocessor_config.json gives images of {output[0]}x{output[1]} pixels (height x "
            f"width), but the model's image_size is {image_size}"
        )
    resample, rescale_factor = settings["resample"], settings["rescale_factor"]
    if not isinstance(resample, int):
        raise ValueError(f"resample={resample!r}: expected one of Pillow's filter codes 0 to 5")
    if not isinstance(rescale_factor, int | float):
        raise ValueError(f"rescale_factor={rescale_factor!r}: expected a number above 0")
    return Preprocessing(
        height=output[0],
        width=output[1],
        resize=resize,
        crop=crop,
        resample=resample,
        mean=_parse_channels(settings, "image_mean") if normalises else (0.0, 0.0, 0.0),
        std=_parse_channels(settings, "image_std") if normalises else (1.0, 1.0, 1.0),
        rescale_factor=float(rescale_factor) if rescales else 1.0,
    )


def _defaults_for(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the defaults of the processor that the config names under its new or old key."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    match = _PROCESSOR_TYPE.fullmatch(name) if isinstance(name, str) else None
    if match is None or match[1] not in _PROCESSOR_DEFAULTS:
        known = ", ".join(f"{prefix}ImageProcessor" for prefix in _PROCESSOR_DEFAULTS)
        raise ValueError(f"image_processor_type={name!r}: expected one of {known}")
    return _PROCESSOR_DEFAULTS[match[1]]


def _flag(settings: Mapping[str, object], name: str) -> bool:
    value = settings[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected true or false")
    return value


def _parse_size(
    settings: Mapping[str, object], name: str, *, int_means: str
) -> int | tuple[int, int]:
    """Return a shortest edge, or (height, width)."""
    value = settings[name]
    sides: list[object] = []
    if isinstance(value, int):
        sides = [value] if int_means == "shortest_edge" else [value, value]
    elif isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        sides = [value["shortest_edge"]]
    elif isinstance(value, Mapping) and set(value) == {"height", "width"}:
        sides = [value["height"], value["width"]]
    elif isinstance(value, list | tuple) and len(value) == 2:
        sides = list(value)
    pixels = [side for side in sides if isinstance(side, int) and _is_positive_int(side)]
    if not sides or len(pixels) != len(sides):
        raise ValueError(
            f"{name}={value!r}: expected an integer above 0, or an object with such integers under "
            "shortest_edge, or under height and width"
        )
    return pixels[0] if len(pixels) == 1 else (pixels[0], pixels[1])


def _parse_channels(settings: Mapping[str, object], name: str) -> tuple[float, float, float]:
    value = settings[name]
    values = value if isinstance(value, list | tuple) else [value] * 3
    numbers = [float(number) for number in values if isinstance(number, int | float)]
    if len(values) != 3 or len(numbers) != 3:
        raise ValueError(f"{name}={value!r}: expected three numbers, for R, G and B")
    return numbers[0], numbers[1], numbers[2]


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

# EXIF 2.32, tag 0x0112: the transposition that shows an image upright, and whether its right and
# its bottom edge come from an edge that was at the left or at the top.
_ORIENTATIONS: Mapping[int, tuple[Image.Transpose, bool, bool]] = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: (Image.Transpose.ROTATE_180, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, False, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, False, True),
}
_FIRST_SIDEWAYS_ORIENTATION = 5
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Upright:
    """A decoded RGB image the way a person sees it."""

    image: Image.Image
    size: _Size
    """(width, height) at full scale, of which `image` may hold a half, a quarter or an eighth."""
    box: _Box
    """The part of `image`, in its own pixels, that the full-scale image covers."""


def decode_pixels(
    encoded: bytes | memoryview, *, preprocessing: Preprocessing, limits: ImageLimits
) -> npt.NDArray[np.uint8]:
    """Decode, turn upright, resize and crop one image.

    The geometry is that of transformers' image processors on Pillow, pixel for pixel, with two
    exceptions: a large JPEG is decoded at a reduced scale (JPEG_DRAFT_MARGIN), and an image over
    20 times longer than wide is cropped while it is resized, so that no long strip is made.

    Args:
        encoded: A JPEG, PNG, WebP, GIF, TIFF or BMP file; of several frames, the first counts.
        preprocessing: The output's size, and how to reach it.
        limits: Above these the image is rejected unseen.

    Returns:
        uint8 [height, width, 3], RGB, HWC, C-contiguous, 0 to 255.

    Raises:
        ImageRejected: The bytes are no usable image; nothing else is raised, whatever they are.
    """
    upright = _decode(encoded, limits=limits, preprocessing=preprocessing)
    return np.array(_fit(upright, preprocessing), dtype=np.uint8)


def rgb_image(encoded: bytes | memoryview, *, limits: ImageLimits) -> Image.Image:
    """Decode one image at its full size: upright, mode RGB, transparency over white.

    Raises:
        ImageRejected: The bytes are no usable image; nothing else is raised, whatever they are.
    """
    return _decode(encoded, limits=limits, preprocessing=None).image


def _decode(
    encoded: bytes | memoryview, *, limits: ImageLimits, preprocessing: Preprocessing | None
) -> _Upright:
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
        return _upright(image, preprocessing=preprocessing)
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


def _check_size(size: _Size, *, limits: ImageLimits) -> None:
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


def _upright(image: ImageFile, *, preprocessing: Preprocessing | None) -> _Upright:
    orientation = 1
    box: _Box | None = None
    size = image.size
    if isinstance(image, JpegImageFile):
        orientation = _exif_orientation(image)
        if preprocessing is not None:
            box = _draft(image, preprocessing, sideways=_is_sideways(orientation))
    if isinstance(image, PngImageFile):
        _scale_transparent_color(image)
    image.load()
    if not isinstance(image, JpegImageFile):
        # A PNG may hold its EXIF block behind its pixels; a TIFF has been turned by Pillow.
        orientation = _exif_orientation(image)
        size = image.size
    rgb = _to_rgb(image)
    right, bottom = box[2:] if box else rgb.size
    if orientation not in _ORIENTATIONS:
        return _Upright(image=rgb, size=size, box=(0, 0, right, bottom))
    method, flips_x, flips_y = _ORIENTATIONS[orientation]
    rgb = rgb.transpose(method)
    if _is_sideways(orientation):
        size = (size[1], size[0])
        right, bottom = bottom, right
    left = rgb.width - right if flips_x else 0.0
    top = rgb.height - bottom if flips_y else 0.0
    return _Upright(image=rgb, size=size, box=(left, top, left + right, top + bottom))


def _is_sideways(orientation: int) -> bool:
    return _FIRST_SIDEWAYS_ORIENTATION <= orientation <= max(_ORIENTATIONS)


def _exif_orientation(image: ImageFile) -> int:
    """Return 1 to 8, or 1 where EXIF is damaged: that spoils no pixel."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _EXIF_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) and orientation in _ORIENTATIONS else 1


def _draft(image: JpegImageFile, preprocessing: Preprocessing, *, sideways: bool) -> _Box | None:
    """Ask for a reduced decoding; returns what the full image covers of it, in its pixels."""
    if preprocessing.resize is None:
        return None
    width, height = image.size
    wanted = _resized_size((height, width) if sideways else (width, height), preprocessing)
    across, down = (math.ceil(side * JPEG_DRAFT_MARGIN) for side in wanted)
    drafted = image.draft(None, (down, across) if sideways else (across, down))
    return drafted[1] if drafted else None


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


def _resized_size(size: _Size, preprocessing: Preprocessing) -> _Size:
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


def _fit(upright: _Upright, preprocessing: Preprocessing) -> Image.Image:
    """Resize and crop; offsets and black padding as in transformers' `center_crop`."""
    image = upright.image
    width, height = _resized_size(upright.size, preprocessing)
    if preprocessing.resize is not None:
        if max(upright.size) > _MAX_ORDINARY_ASPECT * min(upright.size):
            image, width, height = _resize_strip(upright, preprocessing)
        else:
            image = image.resize(
                (width, height), Image.Resampling(preprocessing.resample), upright.box
            )
    if preprocessing.crop is None:
        return image
    crop_height, crop_width = preprocessing.crop
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def _resize_strip(upright: _Upright, preprocessing: Preprocessing) -> tuple[Image.Image, int, int]:
    """Resize an image of extreme aspect: only what the crop keeps, and its long edge first.

    The long edge comes first because Pillow starts with the width, and would make the whole
    height of a narrow image as wide as the output.
    """
    image, (left, top, right, bottom) = upright.image, upright.box
    width, height = _resized_size(upright.size, preprocessing)
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
    return image.resize((width, height), resample, (left, top, right, bottom)), width, height
