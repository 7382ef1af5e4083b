"""Encoded images for tests, made in memory: every format and mode, and broken ones.

Knows nothing of how Clipmill decodes them.
"""

import io
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st
from PIL import Image

Color = tuple[int, int, int]
RED: Color = (200, 30, 40)
SIZE = (48, 32)


def photo(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """An RGB image with smooth colour, edges and noise, so that each resize filter shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(x / 9.0) * 80,
        np.cos(y / 7.0) * 80,
        np.where((x // 16 + y // 16) % 2, 90.0, -90.0),
    ]
    noise = rng.normal(0, 20, size=(height, width, 3))
    pixels = np.clip(np.stack(waves, axis=-1) + 128 + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def four_corners(width: int = 96, height: int = 64) -> Image.Image:
    """Red, green, blue and white quarters, from the top left, row by row."""
    image = Image.new("RGB", (width, height))
    colors = ["red", "lime", "blue", "white"]
    for index, color in enumerate(colors):
        x, y = index % 2 * width // 2, index // 2 * height // 2
        image.paste(Image.new("RGB", (width // 2, height // 2), color), (x, y))
    return image


def flat(color: Color = RED, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.new("RGB", size, color)


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def jpeg(image: Image.Image | None = None, **options: object) -> bytes:
    return encode(image or flat(), "JPEG", **{"quality": 95, "subsampling": 0, **options})


def png(image: Image.Image | None = None, **options: object) -> bytes:
    return encode(image or flat(), "PNG", **options)


def webp(image: Image.Image | None = None) -> bytes:
    return encode(image or flat(), "WEBP", lossless=True)


def bmp(image: Image.Image | None = None) -> bytes:
    return encode(image or flat(), "BMP")


def tiff(image: Image.Image | None = None, **options: object) -> bytes:
    return encode(image or flat(), "TIFF", **options)


def mpo() -> bytes:
    """Two frames, as stereo cameras and phones write them; the first one is red."""
    return encode(flat(), "MPO", save_all=True, append_images=[flat((0, 0, 255))], quality=95)


def animated_gif() -> bytes:
    """Two frames, the first one red."""
    return encode(flat(), "GIF", save_all=True, append_images=[flat((0, 0, 255))])


def animated_webp() -> bytes:
    """Two frames, the first one red."""
    frames = [flat((0, 0, 255))]
    return encode(flat(), "WEBP", save_all=True, append_images=frames, lossless=True)


def cmyk_jpeg() -> bytes:
    """Cyan 0, magenta 200, yellow 100, black 40, stored inverted with an Adobe marker."""
    return encode(Image.new("CMYK", SIZE, (0, 200, 100, 40)), "JPEG", quality=95)


def ycck_jpeg() -> bytes:
    """The inks of `cmyk_jpeg` as luma, chroma and black, which Adobe programs write by default."""
    # Adobe stores inks inverted, and YCCK is YCbCr of the inverse of what is stored.
    ycc = Image.new("RGB", SIZE, (0, 200, 100)).convert("YCbCr")
    # Pillow inverts what it is given to write.
    luma, blue, red = (channel.point(lambda level: 255 - level) for channel in ycc.split())
    image = Image.merge("CMYK", (luma, blue, red, Image.new("L", SIZE, 40)))
    encoded = encode(image, "JPEG", quality=95)
    transform = encoded.index(b"Adobe") + 11
    return encoded[:transform] + b"\x02" + encoded[transform + 1 :]


def exif_rotated_jpeg(
    orientation: int, image: Image.Image | None = None, **options: object
) -> bytes:
    """An image stored so that `orientation` shows it upright."""
    return _oriented(orientation, image, "JPEG", **{"quality": 95, "subsampling": 0, **options})


def exif_rotated_png(orientation: int) -> bytes:
    return _oriented(orientation, None, "PNG")


def exif_rotated_webp(orientation: int) -> bytes:
    return _oriented(orientation, None, "WEBP", lossless=True)


def exif_rotated_tiff(orientation: int) -> bytes:
    return _oriented(orientation, None, "TIFF")


_STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def _oriented(
    orientation: int, image: Image.Image | None, image_format: str, **options: object
) -> bytes:
    image = image or four_corners()
    if orientation in _STORED_AS:
        image = image.transpose(_STORED_AS[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, image_format, exif=exif, **options)


def png_chunks(header: bytes, *, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from an IHDR, filtered rows, and chunks to go between them."""
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            extra,
            png_chunk(b"IDAT", zlib.compress(rows)),
            png_chunk(b"IEND", b""),
        ]
    )


def png_chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png16(levels: tuple[int, ...], *, transparent: tuple[int, ...] | None = None) -> bytes:
    """A flat 16-bit PNG: 1 level is grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[len(levels)]
    width, height = SIZE
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    row = b"\0" + struct.pack(f">{len(levels)}H", *levels) * width
    extra = b""
    if transparent is not None:
        extra = png_chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return png_chunks(header, rows=row * height, extra=extra)


def small_grey_png(num_bits: int, level: int, *, transparent: int | None = None) -> bytes:
    """An 8 x 8 grey PNG of 2 or 4 bits per pixel."""
    header = struct.pack(">IIBBBBB", 8, 8, num_bits, 0, 0, 0, 0)
    packed = int(f"{level:0{num_bits}b}" * (8 // num_bits), 2)
    extra = b"" if transparent is None else png_chunk(b"tRNS", struct.pack(">H", transparent))
    return png_chunks(header, rows=(b"\0" + bytes([packed] * num_bits)) * 8, extra=extra)


def white_is_zero_tiff16(level: int) -> bytes:
    """A 16-bit grey TIFF that counts from white, as scanners of film write them."""
    black_is_zero, white_is_zero = (struct.pack("<HHIHH", 262, 3, 1, kind, 0) for kind in (1, 0))
    return tiff(Image.new("I;16", SIZE, level)).replace(black_is_zero, white_is_zero)


def palette_png_with_transparency() -> bytes:
    """The left half is opaque red, the right half half-transparent black."""
    image = Image.new("P", SIZE, 0)
    image.putpalette([*RED, 0, 0, 0])
    image.paste(1, (SIZE[0] // 2, 0, *SIZE))
    return encode(image, "PNG", transparency=bytes([255, 128]))


def truncated_jpeg() -> bytes:
    encoded = jpeg(photo(200, 150))
    return encoded[: len(encoded) // 2]


def png_bomb(side: int = 30_000) -> bytes:
    """A valid grey PNG of `side` x `side` zeros: 900 million pixels in 1.5 MB."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    # A full flush leaves blocks that depend on nothing, so one compressed row serves for all.
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    row = compressor.compress(bytes(side + 1)) + compressor.flush(zlib.Z_FULL_FLUSH)
    # RFC 1950: Adler-32 of n zeros has the sums 1 and n modulo 65521.
    adler = struct.pack(">HH", side * (side + 1) % 65521, 1)
    rows = b"\x78\xda" + row * side + zlib.compress(b"", 9)[2:-4] + adler
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            png_chunk(b"IDAT", rows),
            png_chunk(b"IEND", b""),
        ]
    )


def text_file() -> bytes:
    return b"<!doctype html><title>404</title> This is not the image you asked for.\n" * 20


VALID: dict[str, Callable[[], bytes]] = {
    "jpeg": jpeg,
    "progressive_jpeg": lambda: jpeg(photo(60, 40), progressive=True),
    "cmyk_jpeg": cmyk_jpeg,
    "ycck_jpeg": ycck_jpeg,
    "exif_jpeg": lambda: exif_rotated_jpeg(6),
    "mpo": mpo,
    "png": lambda: png(photo(60, 40)),
    "grey16_png": lambda: png16((0x8000,)),
    "rgba16_png": lambda: png16((0xC800, 0x1E00, 0x2800, 0x8000)),
    "palette_png": palette_png_with_transparency,
    "webp": webp,
    "animated_webp": animated_webp,
    "exif_webp": lambda: exif_rotated_webp(6),
    "animated_gif": animated_gif,
    "tiff": tiff,
    "lzw_tiff": lambda: tiff(photo(60, 40), compression="tiff_lzw"),
    "exif_tiff": lambda: exif_rotated_tiff(6),
    "bmp": bmp,
}
"""Makers of small valid images by name, to damage or to count on."""

# Mostly in headers, where the parsers are.
PATCHES = st.lists(
    st.tuples(st.integers(0, 400) | st.integers(0, 20_000), st.binary(min_size=1, max_size=4))
)
"""Where to damage a file, and the bytes to put there."""


def patched(encoded: bytes, patches: Sequence[tuple[int, bytes]]) -> bytes:
    damaged = bytearray(encoded)
    for position, patch in patches:
        start = position % len(damaged)
        damaged[start : start + len(patch)] = patch
    return bytes(damaged)
