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
    whole = jpeg(24, 9)
    half = whole[: scan_start(whole) + 30] + END
    size = len(whole)
    # Behind each other by no multiple of four bytes.
    padded = [image + bytes(-len(image) % 4 + 1) for image in (whole, half) * 4]
    content = torch.frombuffer(bytearray(b"".join(padded)), dtype=torch.uint8)
    starts = torch.tensor([0, *map(len, padded[:-1])]).cumsum(0)
    ends = starts + torch.tensor([size, len(half)] * 4)
    assert set((starts % 4).tolist()) == {0, 1, 2, 3}
    bounds = torch.stack([starts, ends], dim=1)
    found = find_early_ends(content.to(DEVICE), bounds.to(DEVICE))
    assert found.tolist() == [False, True] * 4


def test_a_restart_that_is_missing_or_early() -> None:
    whole = jpeg(33, 16, restart_marker_blocks=1)
    first, second = restarts(whole)[:2]
    without = whole[:first] + whole[first + 2 :]
    twice = whole[:second] + whole[first:]
    empty = whole[:first] + whole[first : first + 2] + whole[first:]
    wrong = whole[: second + 1] + b"\xd0" + whole[second + 2 :]
    assert early_ends(whole, without, twice, empty, wrong) == [False, True, True, True, True]


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
