"""Finds JPEGs whose coded pixels end early, on the card: one program reads the codes of one image.

Knows nothing of pixels: it counts blocks, and looks at the tables that this takes (ITU-T T.81,
annexes B, C and F).

The card's JPEG decoder does not tell, and leaves what is missing as it was in its memory. Where
CPUs read the codes, 16 cores looked at 10,919 images/s of 34 kB (an H200's host), and at 31,056
where they do not (an H100's).

What was tried on an H200: ms by `triton.testing.do_bench` for 1,024 photos of 34 kB (2026-11-28)
and of 35 kB (2026-11-30), and images/s of the encode stage with the former, in one process with
four threads, ViT-B/32, fp16 (by a script that `clipmill bench stage` follows):

    a program for each image, byte by byte, lookups in 32 bit    17.6
    four bytes at once, lookups in 16 bit                        12.5   26,925
    a thread for each image, 32 to a program                     45.8   21,811
    8 to a program                                               40.4   19,462
    the second again, the photos of 2026-11-30                   13.2
    no branches from lookup to lookup, one code each             11.3
    up to four codes each, lookups of 9, 10, 11, 12, 13 bits     8.7, 7.5, 6.9, 6.6, 7.6

Those of 12 bits take the card twice the memory of 11, and twice the time to build. 4,096 photos at
once take 19.4 ms (25.0 before), 256 take 5.1 (10.3): a code waits for the one before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.decoding.huffman_lookups import (
    LOOKUP_BITS,
    LOOKUP_SIZE,
    advance_of,
    build_lookup,
    load_byte,
    search_code,
)

# Tables of a JPEG: class (DC or AC) times 4, plus the number that the scan calls it by.
_NUM_TABLES = tl.constexpr(8)
# What a lookup may read: a code of LOOKUP_BITS, and 15 bits that follow it, are fewer.
_ENOUGH_BITS = tl.constexpr(32)
_ONES = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _short(content_ptr: tl.tensor, position: tl.tensor, end: tl.tensor) -> tl.tensor:
    """The two bytes at a position, the first the higher; zero behind the end."""
    high = load_byte(content_ptr, position, end)
    return high << 8 | load_byte(content_ptr, position + 1, end)


@triton.jit
def _next_word(content_ptr: tl.tensor, position: tl.tensor, end: tl.tensor) -> tl.tuple:
    """The four bytes at a position, uint32; whether they may be read, and none is 0xff.

    Near the end they may not: what is read are the two aligned words that they lie in.
    """
    address = content_ptr.to(tl.int64) + position
    word_ptr = (address & -4).to(tl.pointer_type(tl.uint32))
    is_inside = position + 8 <= end
    low = tl.load(word_ptr, mask=is_inside, other=_ONES).to(tl.uint64)
    high = tl.load(word_ptr + 1, mask=is_inside, other=_ONES).to(tl.uint64)
    word = ((high << 32 | low) >> ((address & 3) * 8).to(tl.uint64)).to(tl.uint32)
    # Whether a byte is zero, of the complement (Anderson, Bit Twiddling Hacks).
    complement = word ^ _ONES
    is_plain = (complement - 0x01010101) & word & 0x80808080 == 0
    swapped = word >> 24 | (word >> 8 & 0xFF00) | (word << 8 & 0xFF0000) | word << 24
    return swapped, is_plain


@triton.jit
def _tables_of(tables: tl.tensor, block_of_mcu: tl.tensor, luma_blocks: tl.tensor) -> tl.tensor:
    """Numbers of a block's tables, DC << 4 | AC; those of later components in higher bytes."""
    return tables >> (8 * tl.maximum(block_of_mcu - luma_blocks + 1, 0))


@triton.jit
def _following(block_of_mcu: tl.tensor, blocks_in_mcu: tl.tensor) -> tl.tensor:
    """The next block's place in its MCU."""
    return tl.where(block_of_mcu + 1 == blocks_in_mcu, 0, block_of_mcu + 1)


@triton.jit
def _table(chosen: tl.tensor, coefficient: tl.tensor) -> tl.tensor:
    """Of the next code of a block whose tables these are."""
    return tl.where(coefficient > 0, 4 + (chosen & 3), chosen >> 4 & 3)


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
    lookups_ptr += image.to(tl.int64) * ((_NUM_TABLES + 1) * LOOKUP_SIZE)
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
                kind = load_byte(content_ptr, segment, end)
                table = (kind >> 4 & 1) * 4 + (kind & 3)
                lookup_ptr = lookups_ptr + table * LOOKUP_SIZE
                tl.store(places_ptr + table, (segment + 1 - first).to(tl.int32))
                num_symbols, is_usual = build_lookup(
                    content_ptr,
                    segment + 1,
                    end,
                    lookup_ptr,
                    codes_ptr=lookups_ptr + _NUM_TABLES * LOOKUP_SIZE,
                    is_dc=kind >> 4 == 0,
                )
                segment += 17 + num_symbols
                is_sound = is_sound and is_usual and kind & 0xEC == 0 and segment <= position
                defined |= 1 << table
        elif marker == 0xFFC0 or marker == 0xFFC1:
            height = _short(content_ptr, segment + 1, end)
            width = _short(content_ptr, segment + 3, end)
            num_components = load_byte(content_ptr, segment + 5, end)
            sampling = load_byte(content_ptr, segment + 7, end)
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
            num_components = load_byte(content_ptr, segment, end)
            for component in range(3):
                if component < num_components:
                    chosen = load_byte(content_ptr, segment + 2 + 2 * component, end)
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
    restart_blocks = restart_interval * blocks_in_mcu
    restart = tl.where(restart_interval > 0, restart_blocks, num_blocks)
    num_restarts = 0
    coefficient = 0
    is_sound = is_sound and num_blocks > 0
    while is_sound and block < num_blocks:
        # Lookups, without branches, while there are bytes that mean what they are.
        last = tl.minimum(restart, num_blocks)
        chosen = _tables_of(tables, block_of_mcu, luma_blocks)
        word, is_plain = _next_word(content_ptr, position, end)
        is_told = True
        while is_told and block < last:
            takes_word = num_bits < _ENOUGH_BITS and is_plain
            shift = tl.maximum(32 - num_bits, 0).to(tl.uint64)
            bits |= tl.where(takes_word, word, 0).to(tl.uint64) << shift
            num_bits += tl.where(takes_word, 32, 0)
            position += tl.where(takes_word, 4, 0)
            word, is_plain = _next_word(content_ptr, position, end)
            table = _table(chosen, coefficient)
            start = (bits >> (64 - LOOKUP_BITS)).to(tl.int32)
            found = tl.load(lookups_ptr + table * LOOKUP_SIZE + start).to(tl.int32)
            reached = coefficient + (found >> 5)
            # Not of codes behind the end of a block, which are another table's: only the last one
            # may reach it, which END_OF_BLOCK takes 64 beyond.
            is_told = found > 0 and reached <= 64 + (found >> 5 & 64) and num_bits >= _ENOUGH_BITS
            num_read = tl.where(is_told, found & 31, 0)
            bits = bits << num_read.to(tl.uint64)
            num_bits -= num_read
            following = _following(block_of_mcu, blocks_in_mcu)
            chosen_next = _tables_of(tables, following, luma_blocks)
            coefficient = tl.where(is_told, reached, coefficient)
            is_done = coefficient >= 64
            coefficient = tl.where(is_done, 0, coefficient)
            block += is_done.to(tl.int32)
            block_of_mcu = tl.where(is_done, following, block_of_mcu)
            chosen = tl.where(is_done, chosen_next, chosen)
        if block < last:
            # One code, where 0xff is near or the end, or which no lookup tells of.
            at_marker = False
            while num_bits <= 48 and not at_marker:
                value = load_byte(content_ptr, position, end)
                follower = load_byte(content_ptr, position + 1, end)
                at_marker = (value == 0xFF and follower != 0) or position >= end
                if not at_marker:
                    bits |= value.to(tl.uint64) << tl.cast(56 - num_bits, tl.uint64)
                    num_bits += 8
                    position += 1 + (value == 0xFF).to(tl.int32)
            table = _table(chosen, coefficient)
            place = first + tl.load(places_ptr + table)
            code = search_code(content_ptr, place, end, (bits >> 48).to(tl.int32))
            symbol = code & 0xFF
            num_read = (code >> 8) + (symbol & 15)
            is_sound = code > 0 and num_read <= num_bits
            bits = bits << num_read.to(tl.uint64)
            num_bits -= num_read
            coefficient += tl.where(coefficient > 0, advance_of(symbol), 1)
            if coefficient >= 64:
                coefficient = 0
                block += 1
                block_of_mcu = _following(block_of_mcu, blocks_in_mcu)
        if block == restart and block < num_blocks:
            # Fewer than 8 bits fill up the byte, then comes the marker.
            marker = _short(content_ptr, position, end)
            is_sound = is_sound and num_bits < 8 and marker == 0xFFD0 + num_restarts % 8
            num_restarts += 1
            restart += restart_blocks
            position += 2
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
    # The last is room where they are built.
    shape = (num_images, _NUM_TABLES.value + 1, LOOKUP_SIZE.value)
    # In 16 bit: on each core of the card, those of several images have to stay near.
    lookups = torch.empty(shape, dtype=torch.int16, device=content.device)
    # Where in the file the code lengths of each table are.
    places = torch.empty((num_images, _NUM_TABLES.value), dtype=torch.int32, device=content.device)
    if num_images:
        _is_whole_kernel[(num_images,)](content, bounds, lookups, places, is_whole, num_warps=1)
    return ~is_whole
