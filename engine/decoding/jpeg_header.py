"""Looks at the markers of a JPEG: does the card decode it as Pillow would, and to what size?

Knows nothing of damage inside Huffman tables and coded pixels, or of how the card decodes. What is
odd is not for the card, even where the standard allows it: Pillow judges it.
"""

import re
import struct
from typing import NamedTuple

from engine.images import ImageLimits

# ITU-T T.81, table B.1.
_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
# Not progressive ones, whose early ends nobody finds: the card would leave the rest as it was.
_FRAMES = (0xFFC0, 0xFFC1)
_HUFFMAN_TABLES, _START_OF_SCAN, _QUANTIZATION_TABLES = 0xFFC4, 0xFFDA, 0xFFDB
_RESTART_INTERVAL, _COMMENT = 0xFFDD, 0xFFFE
_APP0, _APP1, _APP2, _APP13, _APP14 = 0xFFE0, 0xFFE1, 0xFFE2, 0xFFED, 0xFFEE
_IN_HEADER = frozenset(
    {*_FRAMES, _HUFFMAN_TABLES, _START_OF_SCAN, _QUANTIZATION_TABLES, _RESTART_INTERVAL}
    | {_COMMENT, *range(_APP0, _APP0 + 16)}
)
# What ends coded pixels: 0xff is stuffed with a zero among them, and restart markers are theirs.
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7]")

_SEGMENT = struct.Struct(">HH")
_FRAME = struct.Struct(">BHHB")
# Ordinary files have 10; each one costs time here and on the card.
_MAX_SEGMENTS = 200
# JPEG_MAX_DIMENSION of libjpeg's jmorecfg.h.
_MAX_SIDE_PIXELS = 65_500
# The colours of some with a shorter side the card interpolates in its own way.
_MIN_SIDE_PIXELS = 16
# Sampling factors, horizontal << 4 | vertical: any of grey; of colour 4:4:4, 4:4:0, 4:2:2, 4:2:0.
_SAMPLINGS = frozenset(
    {bytes((h << 4 | v,)) for h in range(1, 5) for v in range(1, 5)}
    | {bytes((luma, 0x11, 0x11)) for luma in (0x11, 0x12, 0x21, 0x22)}
)
_QUANTIZATION_BYTES = 65

_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = b"tiff:Orientation"
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
# TIFF 6.0, section 2, and Adobe's type 13: bytes of one value, by type.
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SHORT = 3
_ORIENTATION = 0x0112


class Geometry(NamedTuple):
    """How an image is stored."""

    width: int
    """Pixels, before it is turned upright."""
    height: int
    """Pixels, before it is turned upright."""
    orientation: int
    """EXIF's, 1 to 8: where the first row and column are; 1 is upright."""


def gpu_geometry(
    encoded: bytes | memoryview, *, limits: ImageLimits, max_aspect: int
) -> Geometry | None:
    """Geometry of a JPEG that the card decodes as Pillow would, within the limits; else None.

    Copies the header's segments only, and searches the coded pixels for the end marker.

    Args:
        encoded: Any bytes, contiguous; nothing is raised, whatever they are.
        limits: Above these the answer is None.
        max_aspect: How many times longer than wide an image may be, or wider than long.
    """
    view = memoryview(encoded).cast("B")
    if len(view) > limits.max_image_bytes:
        return None
    if bytes(view[:2]) != _START_OF_IMAGE or bytes(view[-2:]) != _END_OF_IMAGE:
        return None
    header = _read_header(view)
    if header is None:
        return None
    segments, scan_start = header
    frames = [frame for marker in _FRAMES for frame in segments.get(marker, [])]
    if len(frames) != 1:
        return None
    frame = frames[0]
    is_usual = (
        _is_usual_frame(frame, limits=limits, max_aspect=max_aspect)
        and _is_usual_scan(segments[_START_OF_SCAN][0], frame)
        and _has_tables(segments, frame)
        and _is_usual_color(segments, frame)
        and _opens_in_pillow(segments)
        and _ends_once(view, scan_start)
    )
    orientation = _find_orientation(segments.get(_APP1, [])) if is_usual else None
    if orientation is None:
        return None
    _, height, width, _ = _FRAME.unpack_from(frame)
    return Geometry(width, height, orientation)


def _read_header(view: memoryview) -> tuple[dict[int, list[bytes]], int] | None:
    """Return the segments' contents by marker, and where the coded pixels start."""
    segments: dict[int, list[bytes]] = {}
    position = 2
    for _ in range(_MAX_SEGMENTS):
        if position + _SEGMENT.size > len(view):
            return None
        marker, num_bytes = _SEGMENT.unpack_from(view, position)
        end = position + 2 + num_bytes
        if marker not in _IN_HEADER:
            return None
        segments.setdefault(marker, []).append(bytes(view[position + _SEGMENT.size : end]))
        if marker == _START_OF_SCAN:
            return segments, end
        position = end
    return None


def _is_usual_frame(frame: bytes, *, limits: ImageLimits, max_aspect: int) -> bool:
    if len(frame) < _FRAME.size:
        return False
    num_bits, height, width, num_components = _FRAME.unpack_from(frame)
    if num_bits != 8 or len(frame) != _FRAME.size + 3 * num_components:
        return False
    short, long = min(width, height), max(width, height)
    return (
        short >= _MIN_SIDE_PIXELS
        and long <= min(_MAX_SIDE_PIXELS, max_aspect * short)
        and width * height <= limits.max_image_pixels
        and frame[7::3] in _SAMPLINGS
    )


def _is_usual_scan(scan: bytes, frame: bytes) -> bool:
    """Whether the scan has all components, with all coefficients."""
    if len(scan) < 6 or len(scan) != 4 + 2 * scan[0]:
        return False
    return scan[1:-3:2] == frame[6::3] and scan[-3:] == b"\0\x3f\0"


def _has_tables(segments: dict[int, list[bytes]], frame: bytes) -> bool:
    """Whether the quantization tables are whole, of 8 bits, and all there; and some Huffman tables.

    Without Huffman tables, as in frames of video, libjpeg takes the standard's.
    """
    quantization = segments.get(_QUANTIZATION_TABLES, [])
    if any(len(tables) % _QUANTIZATION_BYTES for tables in quantization):
        return False
    selectors = {selector for tables in quantization for selector in tables[::_QUANTIZATION_BYTES]}
    return (
        _HUFFMAN_TABLES in segments
        and selectors.issuperset(frame[8::3])
        and selectors.issubset(range(4))
        and all(len(interval) == 2 for interval in segments.get(_RESTART_INTERVAL, []))
    )


def _is_usual_color(segments: dict[int, list[bytes]], frame: bytes) -> bool:
    """Whether colours are grey or YCbCr by any decoder's rule; libjpeg's is in its jdapimin.c."""
    components = frame[6::3]
    if components == b"RGB" or len(set(components)) < len(components):
        return False
    for segment in segments.get(_APP14, []):
        if segment.startswith(b"Adobe") and (
            len(segment) < 12 or (len(components) == 3 and segment[11] != 1)
        ):
            return False
    return True


def _opens_in_pillow(segments: dict[int, list[bytes]]) -> bool:
    """Whether no segment is one on which Pillow fails, or which makes it look for more frames."""
    for segment in segments.get(_APP0, []):
        if segment.startswith(b"JFIF") and len(segment) < 14:
            return False
    for segment in segments.get(_APP2, []):
        if segment.startswith(b"MPF\0") or (
            segment.startswith(b"ICC_PROFILE\0") and len(segment) < 14
        ):
            return False
    # A block of Photoshop's that ends before the length of its name.
    return all(segment[-6:-2] != b"8BIM" for segment in segments.get(_APP13, []))


def _find_orientation(segments: list[bytes]) -> int | None:
    """Return 1 to 8; None where only Pillow knows."""
    exif = [segment for segment in segments if segment.startswith(_EXIF)]
    # Pillow joins several to one.
    if len(exif) > 1:
        return None
    orientation = _read_orientation(exif[0][len(_EXIF) :]) if exif else 0
    # Where EXIF does not tell, Pillow looks into XMP.
    if orientation == 0 and any(
        segment.startswith(_XMP) and _XMP_ORIENTATION in segment for segment in segments
    ):
        return None
    return 1 if orientation == 0 else orientation


def _read_orientation(tiff: bytes) -> int | None:
    """Return 1 to 8, 0 without orientation, and None for what two readers may take differently."""
    byte_order = _BYTE_ORDERS.get(tiff[:4])
    if byte_order is None or len(tiff) < 8:
        return None
    (start,) = struct.unpack_from(byte_order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return None
    (num_entries,) = struct.unpack_from(byte_order + "H", tiff, start)
    entries = tiff[start + 2 : start + 2 + 12 * num_entries]
    if len(entries) < 12 * num_entries:
        return None
    orientation = 0
    for tag, value_type, count, value in struct.iter_unpack(byte_order + "HHII", entries):
        num_bytes = count * _VALUE_BYTES.get(value_type, len(tiff) + 1)
        if num_bytes > 4 and value + num_bytes > len(tiff):
            return None
        if tag == _ORIENTATION:
            # A short stands in the first two bytes of the four.
            short = value & 0xFFFF if byte_order == "<" else value >> 16
            if orientation or (value_type, count) != (_SHORT, 1) or not 1 <= short <= 8:
                return None
            orientation = short
    return orientation


def _ends_once(view: memoryview, position: int) -> bool:
    """Whether the first marker after the scan header is the end marker that the view ends with."""
    found = _MARKER.search(view, position)
    # None only where the header reaches into the end marker.
    return found is not None and found.end() == len(view)
