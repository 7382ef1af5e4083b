"""Finds pixel data that end early inside an intact file, which decoders silently fill up.

Knows nothing of limits, orientation or colours. Not found, because Pillow does not tell: early ends
of JPEGs with several scans (progressive ones) or frames, and of interlaced PNGs.
"""

import io
import re
import struct
import zlib

from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

# ITU-T T.81, table B.1: lossless and arithmetic coding; the next scan or the end of the image.
_OTHER_CODING = re.compile(rb"\xff[\xc3\xc9]")
_SCAN_OR_END = re.compile(rb"\xff[\xda\xd9]")
# 8 bytes of ones, stuffed: libjpeg looks up to 64 bits ahead, also behind the last block.
_LOOKAHEAD = b"\xff\x00" * 8

# ISO/IEC 15948, 11.2.2: samples per pixel, by colour type.
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_MAX_INFLATE_BYTES = 2**14


def strip_end_marker(stream: io.BytesIO, image: JpegImageFile) -> None:
    """Cut an opened JPEG of one scan before its end marker, so that missing blocks raise OSError.

    libjpeg paints what it misses before an end marker; without one Pillow asks for more bytes,
    and says that there are none. An end less than about 8 bytes early passes.

    Args:
        stream: Where `image` was opened, still at the start of its scan.
        image: Opened, not yet loaded.
    """
    start = stream.tell()
    with stream.getbuffer() as encoded:
        if image.info.get("progressive") or _OTHER_CODING.search(encoded, 0, start):
            return
        marker = _SCAN_OR_END.search(encoded, start)
        if marker is None or marker[0] != b"\xff\xd9":
            return
    stream.seek(marker.start())
    stream.write(_LOOKAHEAD)
    stream.truncate()


def has_missing_rows(stream: io.BytesIO, image: PngImageFile) -> bool:
    """Whether a loaded PNG has fewer rows of pixels than its header says.

    Pillow leaves missing rows zero, so only an image whose last row is zero is inflated again.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    if image.info.get("interlace") or last_row.strip(b"\0"):
        return False
    encoded = stream.getvalue()
    num_bits, color_type = encoded[24], encoded[25]
    row_bytes = 1 + (image.width * num_bits * _PNG_SAMPLES[color_type] + 7) // 8
    missing_bytes = row_bytes * image.height
    # Raw, without zlib's header and checksum, which Pillow does not insist on either.
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    compressed = memoryview(_pixel_chunks(encoded))[2:]
    for start in range(0, len(compressed), _MAX_INFLATE_BYTES):
        missing_bytes -= len(inflater.decompress(compressed[start : start + _MAX_INFLATE_BYTES]))
        if missing_bytes <= 0:
            return False
    return True


def _pixel_chunks(encoded: bytes) -> bytes:
    chunks = []
    position = 8
    while position + 8 <= len(encoded):
        num_bytes, name = struct.unpack_from(">I4s", encoded, position)
        if name == b"IDAT":
            chunks.append(encoded[position + 8 : position + 8 + num_bytes])
        position += num_bytes + 12
    return b"".join(chunks)
