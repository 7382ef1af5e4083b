"""Early ends of JPEGs, found on the card or in Triton's interpreter, where they were cut."""

import io
import random

import pytest
import torch
from PIL.JpegImagePlugin import jpeg_factory

from tests import image_files
from tests.triton_device import DEVICE

from engine.decoding.early_ends import find_early_ends  # isort: skip

END = b"\xff\xd9"


pytestmark = pytest.mark.usefixtures("whole_lookups")


def early_ends(*images: bytes) -> list[bool]:
    content = torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8).to(DEVICE)
    ends = torch.tensor([0, *map(len, images)]).cumsum(0)
    bounds = torch.stack([ends[:-1], ends[1:]], dim=1).to(DEVICE)
    return find_early_ends(content, bounds).tolist()


def jpeg(width: int, height: int, *, mode: str = "RGB", **options) -> bytes:
    photo = image_files.photo(width, height).convert(mode)
    return image_files.encode(photo, "JPEG", **options)


def scan_start(encoded: bytes) -> int:
    stream = io.BytesIO(encoded)
    jpeg_factory(stream)
    return stream.tell()


def restarts(encoded: bytes) -> list[int]:
    start = scan_start(encoded)
    found = [at for at in range(start, len(encoded) - 1) if encoded[at] == 0xFF]
    return [at for at in found if 0xD0 <= encoded[at + 1] <= 0xD7]


KINDS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "grey": {"mode": "L"},
    "tables of its own": {"optimize": True, "quality": 95},
    "coarse": {"quality": 1},
    "restarts": {"restart_marker_blocks": 2},
    "finest": {"quality": 98, "subsampling": 0},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_image_is_whole_until_it_is_cut(kind: str) -> None:
    options = {"quality": 75} | KINDS[kind]
    images = [jpeg(width, height, **options) for width, height in ((17, 8), (8, 8))]
    assert early_ends(*images) == [False] * 2
    whole = images[0]
    start = scan_start(whole)
    rng = random.Random(0)
    cuts = [*rng.sample(range(start, len(whole) - 3), 2), len(whole) - 3]
    # What an end may stand behind: no half of a stuffed 0xff, and no restart marker.
    cuts = [cut for cut in cuts if whole[cut - 1] != 0xFF]
    assert early_ends(*(whole[:cut] + END for cut in cuts)) == [True] * len(cuts)


def test_neighbours_do_not_matter() -> None:
    whole = jpeg(19, 13)
    half = whole[: scan_start(whole) + 20] + END
    assert early_ends(half, whole, half, whole) == [True, False, True, False]


def test_where_an_image_starts_does_not_matter() -> None:
    whole = jpeg(8, 8)
    half = whole[: scan_start(whole) + 8] + END
    # Behind each other by no multiple of four bytes.
    padded = [image + bytes(-len(image) % 4 + 1) for image in [whole] * 4 + [half] * 4]
    content = torch.frombuffer(bytearray(b"".join(padded)), dtype=torch.uint8)
    starts = torch.tensor([0, *map(len, padded[:-1])]).cumsum(0)
    ends = starts + torch.tensor([len(whole)] * 4 + [len(half)] * 4)
    assert (starts % 4).tolist() == [0, 1, 2, 3] * 2
    bounds = torch.stack([starts, ends], dim=1)
    found = find_early_ends(content.to(DEVICE), bounds.to(DEVICE))
    assert found.tolist() == [False] * 4 + [True] * 4


def grey(dc_table: bytes, ac_table: bytes, *, width: int, bits: str) -> bytes:
    """A JPEG 8 pixels high of these tables and codes."""
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")

    def segment(marker: int, body: bytes) -> bytes:
        return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body

    tables = segment(0xC4, b"\0" + dc_table) + segment(0xC4, b"\x10" + ac_table)
    frame = segment(0xC0, bytes((8, 0, 8, 0, width, 1, 1, 0x11, 0)))
    return b"\xff\xd8" + frame + tables + segment(0xDA, b"\1\1\0\0\x3f\0") + scan + END


def test_codes_behind_the_last_coefficient_are_the_next_block_s() -> None:
    dc_table = bytes([0, 3, *[0] * 14, 0, 1, 2])
    # 00 is a coefficient of one bit, 01 stands for 16 zeros, and 10 would end the block.
    ac_table = bytes([0, 3, *[0] * 14, 0x01, 0xF0, 0x00])
    # Coefficient 63 is there, so that 10 begins the next block.
    block = "10" + "11" + "01" * 3 + "000" * 15
    whole = grey(dc_table, ac_table, width=64, bits=block * 8)
    cut = grey(dc_table, ac_table, width=64, bits=block * 7)
    assert early_ends(whole, cut) == [False, True]


def test_a_restart_that_is_missing_or_early() -> None:
    whole = jpeg(33, 16, restart_marker_blocks=1)
    first, second = restarts(whole)[:2]
    without = whole[:first] + whole[first + 2 :]
    twice = whole[:second] + whole[first:]
    empty = whole[:first] + whole[first : first + 2] + whole[first:]
    wrong = whole[: second + 1] + b"\xd0" + whole[second + 2 :]
    late = whole[:first] + b"\x7f" + whole[first:]
    assert early_ends(whole, without, twice, empty, wrong, late) == [False] + [True] * 5


def test_codes_that_no_table_has() -> None:
    whole = jpeg(16, 16)
    start = scan_start(whole)
    ones = whole[:start] + b"\xff\x00" * 40 + END
    assert early_ends(ones) == [True]


def changed(encoded: bytes, marker: bytes, offset: int, value: int) -> bytes:
    """With another byte so far behind a marker."""
    at = encoded.index(marker) + offset
    return encoded[:at] + bytes((value,)) + encoded[at + 1 :]


def test_tables_that_libjpeg_does_not_take() -> None:
    whole = jpeg(8, 8, mode="L")
    table, scan = b"\xff\xc4", b"\xff\xda"
    spoiled = {
        "a class that there is not": changed(whole, table, 4, 0x20),
        "a number that there is not": changed(whole, table, 4, 0x04),
        "more codes than bits": changed(whole, table, 6, 4),
        "more symbols than bytes": changed(whole, table, 20, 200),
        "a DC size above 15": changed(whole, table, 21, 16),
        "a DC table that is not defined": changed(whole, scan, 6, 0x10),
        "an AC table that is not defined": changed(whole, scan, 6, 0x01),
    }
    assert early_ends(whole, *spoiled.values()) == [False] + [True] * len(spoiled)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(KINDS))
def test_large_images(kind: str) -> None:
    options = {"quality": 85} | KINDS[kind]
    images = [jpeg(width, height, **options) for width, height in ((500, 375), (1024, 683))]
    rng = random.Random(0)
    cut = [
        image[: rng.randrange(scan_start(image), len(image) - 40)] + END for image in images * 20
    ]
    assert early_ends(*images * 20, *cut) == [False] * 40 + [True] * 40
