"""Finds JPEGs whose coded pixels end early, on the card: one program reads the codes of one image.

Knows nothing of pixels: it counts blocks, and looks at the tables that this takes (ITU-T T.81,
annexes B, C and F).

The card's JPEG decoder does not tell, and leaves what is missing as it was in its memory. Where
CPUs read the codes, 16 cores looked at 10,919 images/s of 34 kB (an H200's host), and at 31,056
where they do not (an H100's).

What was tried on an H200, 2026-11-28: ms for 1,024 photos of 34 kB (`triton.testing.do_bench`), and
images/s of the encode stage with them, in one process with four threads, ViT-B/32, fp16 (by a
script that `clipmill bench stage` follows):

    a program for each image, byte by byte, lookups in 32 bit    17.6
    four bytes at once, lookups in 16 bit                        12.5   26,925
    a thread for each image, 32 to a program                     45.8   21,811
    8 to a program                                               40.4   19,462
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Codes up to this long are looked up, longer ones, rare, are searched for.
_LOOKUP_BITS = tl.constexpr(10)
_LOOKUP_SIZE = tl.constexpr(2**10)
_LOOKUP_PART = tl.constexpr(128)
# Tables of a JPEG: class (DC or AC) times 4, plus the number that the scan calls it by.
_NUM_TABLES = tl.constexpr(8)
# Of a code and the bits that follow it: 16 and 15.
_MAX_SYMBOL_BITS = tl.constexpr(31)


@triton.jit
def _byte(content_ptr: tl.tensor, position: tl.tensor, end: tl.tensor) -> tl.tensor:
    """The byte at a position; zero behind the end."""
    return tl.load(content_ptr + position, mask=position < end, other=0).to(tl.int32)


@triton.jit
def _short(content_ptr: tl.tensor, position: tl.tensor, end: tl.tensor) -> tl.tensor:
    high = _byte(content_ptr, position, end)
    return high << 8 | _byte(content_ptr, position + 1, end)


@triton.jit
def _word(content_ptr: tl.tensor, position: tl.tensor, end: tl.tensor) -> tl.tuple:
    """The four bytes at a position, uint64; whether they all are there and none is 0xff."""
    first = _byte(content_ptr, position, end)
    second = _byte(content_ptr, position + 1, end)
    third = _byte(content_ptr, position + 2, end)
    fourth = _byte(content_ptr, position + 3, end)
    largest = tl.maximum(tl.maximum(first, second), tl.maximum(third, fourth))
    is_plain = (largest < 0xFF) & (position + 4 <= end)
    word = first.to(tl.uint32) << 24 | second.to(tl.uint32) << 16 | third << 8 | fourth
    return word.to(tl.uint64), is_plain


@triton.jit
def _build_lookup(
    content_ptr: tl.tensor,
    position: tl.tensor,
    end: tl.tensor,
    lookup_ptr: tl.tensor,
    is_dc: tl.tensor,
) -> tl.tuple:
    """Store length << 8 | symbol for each start of a code, 0 where the code is longer.

    Args:
        content_ptr: The files.
        position: Of the table's 16 numbers of codes, by length; the symbols follow.
        end: Of the file.
        lookup_ptr: Where to.
        is_dc: Whether its symbols are sizes alone.

    Returns:
        Number of symbols; whether libjpeg takes the table (its jdhuff.c).
    """
    # In parts: what a thread holds in registers, others that run beside it cannot.
    for part in range(0, _LOOKUP_SIZE, _LOOKUP_PART):
        starts = part + tl.arange(0, _LOOKUP_PART)
        bits = starts << (16 - _LOOKUP_BITS)
        length = tl.zeros([_LOOKUP_PART], tl.int32)
        index = tl.zeros([_LOOKUP_PART], tl.int32)
        code = 0
        num_symbols = 0
        for num_bits in range(1, _LOOKUP_BITS + 1):
            count = _byte(content_ptr, position + num_bits - 1, end)
            is_here = (length == 0) & (bits < (code + count) << (16 - num_bits))
            length = tl.where(is_here, num_bits, length)
            index = tl.where(is_here, num_symbols + (bits >> (16 - num_bits)) - code, index)
            code = (code + count) << 1
            num_symbols += count
        is_short = length > 0
        symbol_ptr = content_ptr + position + 16 + index
        symbol = tl.load(symbol_ptr, mask=is_short & (position + 16 + index < end), other=0)
        found = tl.where(is_short, length << 8 | symbol.to(tl.int32), 0)
        tl.store(lookup_ptr + starts, found.to(tl.int16))
    code = 0
    num_symbols = 0
    is_sound = True
    for num_bits in range(1, 17):
        count = _byte(content_ptr, position + num_bits - 1, end)
        # No code is all ones.
        is_sound = is_sound and (count == 0 or code + count < 1 << num_bits)
        code = (code + count) << 1
        num_symbols += count
    numbers = tl.arange(0, 256)
    is_symbol = (numbers < num_symbols) & (position + 16 + numbers < end)
    symbols = tl.load(content_ptr + position + 16 + numbers, mask=is_symbol, other=0)
    largest = tl.max(symbols.to(tl.int32), axis=0)
    is_sound = is_sound and num_symbols <= 256 and (largest < 16 or not is_dc)
    return num_symbols, is_sound


@triton.jit
def _search(
    content_ptr: tl.tensor, position: tl.tensor, end: tl.tensor, bits: tl.tensor
) -> tl.tensor:
    """Length << 8 | symbol of the code that 16 bits start with; 0 if it is none."""
    found = 0
    code = 0
    num_symbols = 0
    for num_bits in range(1, 17):
        count = _byte(content_ptr, position + num_bits - 1, end)
        start = bits >> (16 - num_bits)
        if found == 0 and start < code + count:
            symbol = _byte(content_ptr, position + 16 + num_symbols + start - code, end)
            found = num_bits << 8 | symbol
        code = (code + count) << 1
        num_symbols += count
    return found


@triton.jit
def _is_whole_kernel(
    content_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    lookups_ptr: tl.tensor,
    places_ptr: tl.tensor,
    out_ptr: tl.tensor,
) -> None:
    """Store whether all blocks of an image are there."""
    image = tl.program_id(0)
    first = tl.load(bounds_ptr + 2 * image)
    end = tl.load(bounds_ptr + 2 * image + 1)
    lookups_ptr += image.to(tl.int64) * (_NUM_TABLES * _LOOKUP_SIZE)
    places_ptr += image * _NUM_TABLES

    # The header.
    position = first + 2
    num_blocks = 0
    luma_blocks = 1
    blocks_in_mcu = 1
    restart_interval = 0
    tables = 0  # of the components, a byte each: DC << 4 | AC
    defined = 0  # a bit for each table
    is_sound = True
    in_header = position < end
    while in_header:
        marker = _short(content_ptr, position, end)
        segment = position + 4
        position += 2 + _short(content_ptr, position + 2, end)
        if marker == 0xFFC4:
            while segment < position and segment < end:
                kind = _byte(content_ptr, segment, end)
                table = (kind >> 4 & 1) * 4 + (kind & 3)
                lookup_ptr = lookups_ptr + table * _LOOKUP_SIZE
                tl.store(places_ptr + table, (segment + 1 - first).to(tl.int32))
                num_symbols, is_usual = _build_lookup(
                    content_ptr, segment + 1, end, lookup_ptr, kind >> 4 == 0
                )
                segment += 17 + num_symbols
                is_sound = is_sound and is_usual and kind & 0xEC == 0 and segment <= position
                defined |= 1 << table
        elif marker == 0xFFC0 or marker == 0xFFC1:
            height = _short(content_ptr, segment + 1, end)
            width = _short(content_ptr, segment + 3, end)
            num_components = _byte(content_ptr, segment + 5, end)
            sampling = _byte(content_ptr, segment + 7, end)
            if num_components == 1:
                num_blocks = ((width + 7) // 8) * ((height + 7) // 8)
            else:
                # Not 0 in what suits the card.
                across = tl.maximum(sampling >> 4, 1)
                down = tl.maximum(sampling & 15, 1)
                luma_blocks = across * down
                blocks_in_mcu = luma_blocks + num_components - 1
                columns = (width + 8 * across - 1) // (8 * across)
                rows = (height + 8 * down - 1) // (8 * down)
                num_blocks = columns * rows * blocks_in_mcu
        elif marker == 0xFFDD:
            restart_interval = _short(content_ptr, segment, end)
        elif marker == 0xFFDA:
            num_components = _byte(content_ptr, segment, end)
            for component in range(3):
                if component < num_components:
                    chosen = _byte(content_ptr, segment + 2 + 2 * component, end)
                    tables |= chosen << (8 * component)
                    wanted = 1 << (chosen >> 4 & 3) | 16 << (chosen & 3)
                    is_sound = is_sound and chosen & 0xCC == 0 and defined & wanted == wanted
            in_header = False
        in_header = in_header and position < end
    tl.debug_barrier()  # what some threads stored, others load

    # The codes. Bits not yet read are left-aligned; their number falls below 0 where they lack.
    bits = tl.zeros([], tl.uint64)
    num_bits = 0
    block = 0
    block_of_mcu = 0
    mcus_to_restart = restart_interval
    num_restarts = 0
    coefficient = 0
    is_sound = is_sound and num_blocks > 0
    while is_sound and block < num_blocks:
        if num_bits < _MAX_SYMBOL_BITS:
            # Four bytes, which do not wait for each other; one by one where 0xff is near.
            word, is_plain = _word(content_ptr, position, end)
            if is_plain:
                bits |= word << tl.cast(32 - num_bits, tl.uint64)
                num_bits += 32
                position += 4
            else:
                at_marker = False
                while num_bits <= 48 and not at_marker:
                    value = _byte(content_ptr, position, end)
                    follower = _byte(content_ptr, position + 1, end)
                    at_marker = (value == 0xFF and follower != 0) or position >= end
                    if not at_marker:
                        bits |= value.to(tl.uint64) << tl.cast(56 - num_bits, tl.uint64)
                        num_bits += 8
                        position += 1 + (value == 0xFF).to(tl.int32)
        component = tl.maximum(block_of_mcu - luma_blocks + 1, 0)
        chosen = tables >> (8 * component)
        is_ac = coefficient > 0
        table = tl.where(is_ac, 4 + (chosen & 3), chosen >> 4 & 3)
        start = (bits >> (64 - _LOOKUP_BITS)).to(tl.int32)
        code = tl.load(lookups_ptr + table * _LOOKUP_SIZE + start).to(tl.int32)
        if code == 0:
            place = first + tl.load(places_ptr + table)
            code = _search(content_ptr, place, end, (bits >> 48).to(tl.int32))
        symbol = code & 0xFF
        size = symbol & 15
        # Without a size: 16 zeros, or nothing but zeros to the end of the block.
        run = tl.where(size == 0 and symbol != 0xF0, 64, symbol >> 4)
        coefficient += tl.where(is_ac, run + 1, 1)
        num_read = (code >> 8) + size
        is_sound = code > 0 and num_read <= num_bits
        bits = bits << num_read.to(tl.uint64)
        num_bits -= num_read
        if coefficient >= 64:
            coefficient = 0
            block += 1
            block_of_mcu += 1
            if block_of_mcu == blocks_in_mcu:
                block_of_mcu = 0
                mcus_to_restart -= 1
                if mcus_to_restart == 0 and block < num_blocks:
                    # Fewer than 8 bits fill up the byte, then comes the marker.
                    marker = _short(content_ptr, position, end)
                    is_sound = is_sound and num_bits < 8 and marker == 0xFFD0 + num_restarts % 8
                    num_restarts += 1
                    position += 2
                    mcus_to_restart = restart_interval
                    bits = bits & 0
                    num_bits = 0
    tl.store(out_ptr + image, is_sound)


def find_early_ends(content: Tensor, bounds: Tensor) -> Tensor:
    """Which images lack some of their blocks, or have tables or codes that libjpeg does not take.

    What CPUs call whole is rejected here where its last bits are missing, as libjpeg reads ones
    behind an end; so this is no verdict.

    Args:
        content: uint8 on the card: JPEGs of which `jpeg_header.gpu_geometry` knows, and more.
        bounds: int64 [n, 2] on the card: where in it each one starts, and where it ends.

    Returns:
        bool [n] on the card.
    """
    num_images = len(bounds)
    is_whole = torch.empty(num_images, dtype=torch.bool, device=content.device)
    shape = (num_images, _NUM_TABLES.value, _LOOKUP_SIZE.value)
    # In 16 bit: on each core of the card, those of several images have to stay near.
    lookups = torch.empty(shape, dtype=torch.int16, device=content.device)
    # Where in the file the code lengths of each table are.
    places = torch.empty(shape[:2], dtype=torch.int32, device=content.device)
    if num_images:
        _is_whole_kernel[(num_images,)](content, bounds, lookups, places, is_whole, num_warps=1)
    return ~is_whole
