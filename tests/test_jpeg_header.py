"""Tests of engine/decoding/jpeg_header.py: for the card is only what Pillow reads the same way."""

import io
import random
import struct
import warnings
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile, jpeg_factory

from engine.decoding.jpeg_header import Geometry, gpu_geometry
from engine.images import ImageLimits, rgb_image
from tests import image_files

LIMITS = ImageLimits()
MAX_ASPECT = 20
JPEG_END = b"\xff\xd9"
PHOTO = image_files.photo(60, 44)
APP0, APP1, APP2, APP13, APP14, COMMENT = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE


def suits(encoded: bytes | memoryview) -> Geometry | None:
    return gpu_geometry(encoded, limits=LIMITS, max_aspect=MAX_ASPECT)


def photo_jpeg(**options: object) -> bytes:
    return image_files.jpeg(PHOTO, **{"quality": 75, "subsampling": 2, **options})


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(*segments: bytes, encoded: bytes | None = None) -> bytes:
    """A JPEG with segments behind its start."""
    encoded = encoded or photo_jpeg()
    return encoded[:2] + b"".join(segments) + encoded[2:]


def without(marker: int, encoded: bytes) -> bytes:
    """A JPEG without the segments of one marker; the marker may not occur inside others."""
    while (start := encoded.find(bytes((0xFF, marker)))) >= 0:
        (num_bytes,) = struct.unpack_from(">H", encoded, start + 2)
        encoded = encoded[:start] + encoded[start + 2 + num_bytes :]
    return encoded


def scan_start(encoded: bytes) -> int:
    """Where the coded pixels start."""
    stream = io.BytesIO(encoded)
    jpeg_factory(stream)
    return stream.tell()


def in_frame(position: int, value: bytes, encoded: bytes | None = None) -> bytes:
    """A JPEG with bytes of its frame header changed, counted from its marker."""
    encoded = encoded or photo_jpeg()
    start = encoded.index(b"\xff\xc0") + position
    return encoded[:start] + value + encoded[start + len(value) :]


def in_scan(position: int, value: bytes, encoded: bytes | None = None) -> bytes:
    """A JPEG with bytes of its scan header changed, counted from the coded pixels."""
    encoded = encoded or photo_jpeg()
    start = scan_start(encoded) + position
    return encoded[:start] + value + encoded[start + len(value) :]


Entry = tuple[int, int, int, bytes]
"""Tag, type, count, and the four bytes of a value or its offset."""


def tiff(*entries: Entry, order: str = "<", tail: bytes = b"") -> bytes:
    """A TIFF file of one directory; its tail starts at byte 14 + 12 * entries."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    packed = b"".join(
        struct.pack(order + "HHI", tag, value_type, count) + value
        for tag, value_type, count, value in entries
    )
    return b"".join(
        [head, struct.pack(order + "IH", 8, len(entries)), packed, struct.pack(order + "I", 0)]
    ) + (tail)


def orientation_entry(orientation: int, *, order: str = "<", value_type: int = 3) -> Entry:
    return 0x0112, value_type, 1, struct.pack(order + "HH", orientation, 0)


def exif(content: bytes) -> bytes:
    return segment(APP1, b"Exif\0\0" + content)


def xmp(orientation: int) -> bytes:
    packet = f'<x:xmpmeta><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'
    return segment(APP1, b"http://ns.adobe.com/xap/1.0/\0" + packet.encode())


def adobe(transform: int) -> bytes:
    return segment(APP14, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform))


def pillow_orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def check_with_pillow(encoded: bytes) -> None:
    """Assert that Pillow opens what the card is to decode, in its size and orientation."""
    with warnings.catch_warnings():
        # As `rgb_image` does: Pillow warns of numbers in EXIF that nothing depends on.
        warnings.simplefilter("ignore")
        image = jpeg_factory(io.BytesIO(encoded))
        orientation = pillow_orientation(image)
    assert type(image) is JpegImageFile
    assert image.mode in {"L", "RGB"}
    assert min(image.size) > 0
    assert max(image.size) <= MAX_ASPECT * min(image.size)
    assert image.width * image.height <= LIMITS.max_image_pixels
    assert suits(encoded) == (*image.size, orientation)


# --- For the card ---

ICC_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RATIONAL = struct.pack("<II", 72, 1)
PHONE_TIFF = tiff(
    (0x010F, 2, 6, struct.pack("<I", 62)),
    (0x0110, 2, 3, b"X1\0\0"),
    orientation_entry(6),
    (0x011A, 5, 1, struct.pack("<I", 68)),
    tail=b"Maker\0" + RATIONAL,
)

SUITABLE: dict[str, bytes] = {
    **{f"subsampling {index}": photo_jpeg(subsampling=index) for index in (0, 1, 2)},
    "4:4:0": in_frame(11, b"\x12", photo_jpeg(subsampling=1)),
    **{f"quality {quality}": photo_jpeg(quality=quality) for quality in (1, 100)},
    "grey": image_files.jpeg(PHOTO.convert("L")),
    "grey of 2 x 2 samples": in_frame(11, b"\x22", image_files.jpeg(PHOTO.convert("L"))),
    "grey with an adobe marker": with_segments(
        adobe(0), encoded=image_files.jpeg(PHOTO.convert("L"))
    ),
    "extended": photo_jpeg().replace(b"\xff\xc0", b"\xff\xc1"),
    "optimized tables": photo_jpeg(optimize=True),
    "restart markers by blocks": photo_jpeg(restart_marker_blocks=2),
    "restart markers by rows": photo_jpeg(restart_marker_rows=1),
    "colour profile": photo_jpeg(icc_profile=ICC_PROFILE),
    "large colour profile": photo_jpeg(icc_profile=bytes(150_000)),
    "comment": photo_jpeg(comment=b"a comment \xff\xd9 with an end marker"),
    "thumbnail": with_segments(segment(0xE5, image_files.jpeg())),
    "photoshop": with_segments(
        segment(APP13, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10" + bytes(16))
    ),
    "no jfif": without(APP0, photo_jpeg()),
    "unusual components": in_scan(
        -9, b"Y\0b\x11r\x11", in_frame(10, b"Y\x22\0b\x11\1r\x11\1", without(APP0, photo_jpeg()))
    ),
    "adobe ycbcr": with_segments(adobe(1), encoded=without(APP0, photo_jpeg())),
    "exif without orientation": with_segments(exif(tiff((0x0110, 2, 3, b"X1\0\0")))),
    "exif of a phone": with_segments(exif(PHONE_TIFF)),
    "exif without entries": with_segments(exif(tiff())),
    "orientation with padding": with_segments(exif(tiff((0x0112, 3, 1, b"\6\0\xff\xff")))),
    "exif and xmp": with_segments(exif(tiff(orientation_entry(6))), xmp(6)),
    "xmp without orientation": with_segments(
        segment(APP1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>")
    ),
    "16 x 16 pixels": image_files.jpeg(image_files.flat(size=(16, 16))),
    "20 times as wide": image_files.jpeg(image_files.flat(size=(320, 16))),
    "20 times as long": image_files.jpeg(image_files.flat(size=(16, 320))),
}


@pytest.mark.parametrize("name", SUITABLE)
def test_usual_jpegs_are_for_the_card(name: str) -> None:
    encoded = SUITABLE[name]
    assert suits(encoded)
    check_with_pillow(encoded)
    assert rgb_image(encoded, limits=LIMITS).mode == "RGB"


@pytest.mark.parametrize("name", SUITABLE)
def test_a_view_is_judged_as_bytes_are(name: str) -> None:
    encoded = SUITABLE[name]
    inside = memoryview(b"before" + encoded + b"behind")[6:-6]
    assert suits(inside)
    assert suits(inside.cast("b"))
    assert not suits(inside[:-1])
    assert not suits(inside[1:])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_for_the_card(orientation: int, order: str) -> None:
    encoded = image_files.exif_rotated_jpeg(orientation)
    own = with_segments(exif(tiff(orientation_entry(orientation, order=order), order=order)))
    for one in (encoded, own):
        assert suits(one)
        check_with_pillow(one)
        assert pillow_orientation(jpeg_factory(io.BytesIO(one))) == orientation


@pytest.mark.parametrize("seed", range(30))
def test_any_size_and_options_are_for_the_card(seed: int) -> None:
    rng = random.Random(seed)
    encoded = image_files.jpeg(
        image_files.photo(rng.randint(16, 200), rng.randint(16, 200)),
        quality=rng.choice([1, 30, 75, 95, 100]),
        subsampling=rng.choice([0, 1, 2]),
        optimize=rng.random() < 0.5,
        restart_marker_blocks=rng.choice([0, 3]),
    )
    assert suits(encoded)
    check_with_pillow(encoded)


# --- Valid, but not for the card ---

RGB = image_files.jpeg(PHOTO, keep_rgb=True)
OUTSIDE = struct.pack("<I", 1000)
INSIDE = struct.pack("<I", 0)
UNSUITABLE: dict[str, bytes] = {
    "progressive": photo_jpeg(progressive=True),
    "progressive grey": image_files.jpeg(PHOTO.convert("L"), progressive=True),
    "cmyk": image_files.cmyk_jpeg(),
    "ycck": image_files.ycck_jpeg(),
    "rgb by adobe marker": RGB,
    "rgb by components": without(APP14, RGB),
    "rgb by adobe marker, against jfif": with_segments(adobe(0)),
    "adobe marker of ycck": with_segments(adobe(2)),
    "adobe marker cut short": with_segments(segment(APP14, b"Adobe\0\x64\0\0\0\0")),
    "4:1:1": in_frame(11, b"\x41"),
    "chroma above luma": in_frame(14, b"\x22"),
    "unequal chroma": in_frame(14, b"\x21"),
    "mpo": image_files.mpo(),
    "mpo without its second frame": with_segments(segment(APP2, b"MPF\0" + tiff())),
    "comment behind coded pixels": photo_jpeg()[:-2] + segment(COMMENT, b"comment") + JPEG_END,
    "trailing zeros": photo_jpeg() + bytes(100),
    "trailing end marker": photo_jpeg() + JPEG_END,
    "trailing jpeg": photo_jpeg() + image_files.jpeg(),
    "fill bytes": with_segments(b"\xff\xff"),
    "standard huffman tables": without(0xC4, photo_jpeg()),
    "two exif segments": with_segments(exif(tiff(orientation_entry(6))), exif(PHONE_TIFF)),
    "exif in two parts": with_segments(exif(PHONE_TIFF[:40]), exif(PHONE_TIFF[40:])),
    "orientation in xmp": with_segments(xmp(6)),
    "orientation in xmp beside exif": with_segments(exif(tiff((0x0110, 2, 1, bytes(4)))), xmp(6)),
    "no exif in exif": with_segments(exif(b"")),
    "text in exif": with_segments(exif(b"this is no TIFF file, is it?")),
    "bigtiff in exif": with_segments(exif(b"II+\0" + tiff()[4:])),
    "exif cut short": with_segments(exif(tiff(orientation_entry(6))[:20])),
    "exif header alone": with_segments(exif(b"II*\0\x08\0\0\0")),
    "exif of seven bytes": with_segments(exif(b"II*\0\x08\0\0")),
    "exif directory outside": with_segments(exif(b"II*\0" + OUTSIDE + bytes(40))),
    "exif without type": with_segments(exif(tiff((0x0110, 0, 1, bytes(4))))),
    "exif name outside": with_segments(exif(tiff((0x010F, 2, 9, OUTSIDE), orientation_entry(6)))),
    "exif resolution outside": with_segments(
        exif(tiff(orientation_entry(6), (0x011B, 5, 1, OUTSIDE)))
    ),
    "two orientations": with_segments(exif(tiff(orientation_entry(1), orientation_entry(6)))),
    "long orientation": with_segments(exif(tiff(orientation_entry(6, value_type=4)))),
    "orientation of two values": with_segments(exif(tiff((0x0112, 3, 2, b"\6\0\6\0")))),
    **{
        f"orientation {orientation}": with_segments(exif(tiff(orientation_entry(orientation))))
        for orientation in (0, 9, 65535)
    },
    "21 times as wide": image_files.jpeg(image_files.flat(size=(315, 15))),
    "21 times as long": image_files.jpeg(image_files.flat(size=(15, 315))),
    "png": image_files.png(),
    "webp": image_files.webp(),
    "tiff": image_files.tiff(),
    "gif": image_files.animated_gif(),
}


@pytest.mark.parametrize("name", UNSUITABLE)
def test_unusual_images_are_for_pillow(name: str) -> None:
    # Ours to keep: Pillow reads each one of these, in its own way.
    assert rgb_image(UNSUITABLE[name], limits=LIMITS).mode == "RGB"
    assert not suits(UNSUITABLE[name])


def test_sequential_scans_of_one_component_each_are_for_pillow() -> None:
    grey = image_files.jpeg(PHOTO.convert("L"))
    whole = photo_jpeg(subsampling=0)
    start = scan_start(whole)
    scan = segment(0xDA, b"\1\1\0\0\x3f\0") + grey[scan_start(grey) : -2]
    header = whole[: whole.index(b"\xff\xda")]
    assert suits(header + whole[whole.index(b"\xff\xda") : start] + whole[start:])
    assert not suits(header + scan + JPEG_END)
    # A scan of all components, and a second one.
    assert not suits(whole[:-2] + scan + JPEG_END)


# --- Damaged ---

DAMAGED: dict[str, bytes] = {
    "junk between segments": with_segments(b"\0\0"),
    "equal components": in_scan(-7, b"\1", in_frame(13, b"\1")),
    "12 bits": in_frame(4, b"\x0c"),
    "16 bits": in_frame(4, b"\x10"),
    "no height": in_frame(5, b"\0\0"),
    "no height and no width": in_frame(5, b"\0\0\0\0"),
    "no width": in_frame(7, b"\0\0"),
    "2 components": in_frame(9, b"\x02"),
    "4 components": in_frame(9, b"\x04"),
    "no components": in_frame(9, b"\x00"),
    "no sampling factors": in_frame(11, b"\0"),
    "no sampling factors of grey": in_frame(11, b"\0", image_files.jpeg(PHOTO.convert("L"))),
    "sampling factor 5 of grey": in_frame(11, b"\x15", image_files.jpeg(PHOTO.convert("L"))),
    "frame cut short": in_frame(2, b"\0\x07"),
    "frame beyond the end": in_frame(2, b"\xff\xff"),
    **{
        f"frame of {num_bytes} bytes": with_segments(
            segment(0xC0, b"\x08\0\x2c\0\x3c\1"[:num_bytes]), encoded=without(0xC0, photo_jpeg())
        )
        for num_bytes in range(7)
    },
    **{
        f"scan of {num_bytes} bytes": without(0xDA, photo_jpeg()[: scan_start(photo_jpeg())])
        + segment(0xDA, bytes(num_bytes))
        + photo_jpeg()[scan_start(photo_jpeg()) :]
        for num_bytes in range(6)
    },
    "missing quantization table": in_frame(12, b"\x03"),
    "quantization table 4": in_frame(12, b"\x04"),
    "quantization tables of half a table": with_segments(segment(0xDB, bytes(30))),
    "quantization table 4 beside the others": with_segments(segment(0xDB, b"\4" + b"\1" * 64)),
    "quantization table of 16 bits": with_segments(segment(0xDB, b"\x10" + bytes(128))),
    "restart interval of 3 bytes": with_segments(segment(0xDD, bytes(3))),
    "no quantization tables": without(0xDB, photo_jpeg()),
    "no frame": without(0xC0, photo_jpeg()),
    "two frames": with_segments(segment(0xC0, b"\x08\0\x2c\0\x3c\1\1\x11\0")),
    "two frames of a kind each": with_segments(segment(0xC1, b"\x08\0\x2c\0\x3c\1\1\x11\0")),
    "scan of no components": in_scan(-10, b"\0"),
    "scan of an unknown component": in_scan(-9, b"\7"),
    "scan beyond the end": in_scan(-12, b"\xff\xff"),
    "scan of some coefficients": in_scan(-2, b"\x05"),
    "scan without the first coefficient": in_scan(-3, b"\1"),
    "scan of coarse coefficients": in_scan(-1, b"\1"),
    "segment of no bytes": with_segments(b"\xff\xfe\0\0"),
    "segment of one byte": with_segments(b"\xff\xfe\0\1"),
    "segment beyond the end": with_segments(b"\xff\xfe\xff\xff"),
    "second start": with_segments(b"\xff\xd8"),
    "early end": with_segments(JPEG_END),
    "end between coded pixels": in_scan(100, JPEG_END),
    "start between coded pixels": in_scan(100, b"\xff\xd8"),
    "frame behind coded pixels": photo_jpeg()[:-2]
    + segment(0xC0, b"\x08\0\x2c\0\x3c\1\1\x11\0")
    + JPEG_END,
    "end of fill bytes": photo_jpeg()[:-2] + b"\xff" + JPEG_END,
    "end inside a table": photo_jpeg()[:-2] + b"\xff\xc4" + JPEG_END,
    "jfif cut short": with_segments(segment(APP0, b"JFIF\0")),
    "profile cut short": with_segments(segment(APP2, b"ICC_PROFILE\0")),
    "photoshop cut short": with_segments(segment(APP13, b"Photoshop 3.0\x008BIM\x03\xed")),
    "number of lines": with_segments(segment(0xDC, b"\0\x2c")),
    "arithmetic coding": with_segments(segment(0xCC, b"\0\x10")),
    "endless segments": with_segments(segment(COMMENT, b"") * 1000),
    **{
        f"frame marker {marker:#x}": photo_jpeg().replace(b"\xff\xc0", bytes((0xFF, marker)))
        for marker in (0xC2, 0xC3, *range(0xC5, 0xD0))
    },
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_jpegs_are_for_pillow(name: str) -> None:
    assert suits(photo_jpeg())
    assert not suits(DAMAGED[name])


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}])
def test_no_truncated_jpeg_is_for_the_card(options: dict[str, int]) -> None:
    whole = photo_jpeg(icc_profile=ICC_PROFILE[:100], comment=b"comment", **options)
    assert suits(whole)
    for cut in range(len(whole)):
        assert not suits(whole[:cut])
        # An end marker behind a header that is cut short.
        assert not suits(whole[: min(cut, scan_start(whole) - 1)] + JPEG_END)


# --- Limits ---


def test_limits_are_inclusive() -> None:
    encoded = photo_jpeg()
    num_bytes, num_pixels = len(encoded), PHOTO.width * PHOTO.height
    for max_image_bytes, max_image_pixels, expected in (
        (num_bytes, num_pixels, True),
        (num_bytes - 1, num_pixels, False),
        (num_bytes, num_pixels - 1, False),
    ):
        limits = ImageLimits(max_image_bytes=max_image_bytes, max_image_pixels=max_image_pixels)
        found = gpu_geometry(encoded, limits=limits, max_aspect=MAX_ASPECT)
        assert (found is not None) == expected


def test_more_pixels_than_libjpeg_reads_are_for_pillow() -> None:
    limits = ImageLimits(max_image_pixels=2**40)
    for side, expected in ((65_500, True), (65_501, False)):
        encoded = in_frame(5, struct.pack(">HH", 4_000, side))
        found = gpu_geometry(encoded, limits=limits, max_aspect=MAX_ASPECT)
        assert (found is not None) == expected


def test_aspect_is_the_callers_choice() -> None:
    encoded = image_files.jpeg(image_files.flat(size=(33, 16)))
    assert gpu_geometry(encoded, limits=LIMITS, max_aspect=3)
    assert not gpu_geometry(encoded, limits=LIMITS, max_aspect=2)


# --- Any bytes ---

ENCODED = [*SUITABLE.values(), *UNSUITABLE.values(), *DAMAGED.values()]


def test_changed_bytes_of_a_header_never_part_the_card_from_pillow() -> None:
    whole = with_segments(exif(PHONE_TIFF), adobe(1), encoded=photo_jpeg())
    num_suitable = num_unsuitable = 0
    for position in range(scan_start(whole)):
        for value in (0, 1, 0xFF, whole[position] ^ 1, whole[position] ^ 0x80):
            encoded = whole[:position] + bytes((value,)) + whole[position + 1 :]
            if suits(encoded):
                check_with_pillow(encoded)
                num_suitable += 1
            else:
                num_unsuitable += 1
    assert num_suitable > 300
    assert num_unsuitable > 300


@given(st.sampled_from(ENCODED), image_files.PATCHES)
@settings(max_examples=200)
def test_damage_never_parts_the_card_from_pillow(
    encoded: bytes, patches: Sequence[tuple[int, bytes]]
) -> None:
    damaged = image_files.patched(encoded, patches)
    if suits(damaged):
        check_with_pillow(damaged)


TAGS = st.sampled_from([0x0112, 0x011A, 0x0128, 0x010F, 0x0131, 0x011B, 0x013E, 0x8769])
ENTRIES = st.tuples(
    TAGS,
    st.integers(0, 14),
    st.integers(0, 8),
    st.binary(min_size=4, max_size=4) | st.integers(0, 99).map(lambda n: struct.pack("<I", n)),
) | st.integers(1, 8).map(orientation_entry)


@given(st.lists(ENTRIES, max_size=5), st.binary(max_size=60))
@settings(max_examples=300)
def test_pillow_and_the_card_turn_an_image_alike(entries: list[Entry], tail: bytes) -> None:
    encoded = with_segments(exif(tiff(*entries, tail=tail)))
    if suits(encoded):
        check_with_pillow(encoded)


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_random_bytes_are_not_for_the_card(encoded: bytes) -> None:
    for start in (b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\0\x10JFIF", photo_jpeg()[:200]):
        assert not suits(start + encoded)
        assert not suits(start + encoded + JPEG_END)
