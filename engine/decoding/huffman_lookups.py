"""Finds Huffman codes of a JPEG on the card: by lookups that this builds, or one by one.

Knows nothing of components or restarts, or of where in a file its tables are (ITU-T T.81, annexes
C and F).

Only how far codes reach is asked for, so one lookup tells of as many codes, with the bits that
follow each, as its bits show: 1.7 of a photo's on average.
"""

import triton
import triton.language as tl

LOOKUP_BITS = tl.constexpr(11)
"""That a lookup is shown; codes that are longer, which is rare, are searched for."""
LOOKUP_SIZE = tl.constexpr(2**LOOKUP_BITS.value)
_LOOKUP_PART = tl.constexpr(128)
_MAX_CODES = tl.constexpr(4)  # 11 bits hardly ever show a fifth
END_OF_BLOCK = tl.constexpr(65)
"""What the code that ends a block advances, besides the coefficients before it."""
# Of a lookup without that code; with it 65 to 127, so that the bit of 64 tells which.
_MAX_ADVANCE = tl.constexpr(62)


@triton.jit
def load_byte(content_ptr: tl.tensor, position: tl.tensor, end: tl.tensor) -> tl.tensor:
    """The byte at a position; zero behind the end."""
    return tl.load(content_ptr + position, mask=position < end, other=0).to(tl.int32)


@triton.jit
def advance_of(symbol: tl.tensor) -> tl.tensor:
    """Coefficients that an AC symbol is about; END_OF_BLOCK if there are no more in the block."""
    # Without a size: 16 zeros, or nothing but zeros to the end of the block.
    is_end = (symbol & 15 == 0) & (symbol != 0xF0)
    return tl.where(is_end, END_OF_BLOCK, (symbol >> 4) + 1)


@triton.jit
def build_lookup(
    content_ptr: tl.tensor,
    position: tl.tensor,
    end: tl.tensor,
    lookup_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    is_dc: tl.tensor,
) -> tl.tuple:
    """Store advance << 5 | bits read, for each that LOOKUP_BITS can be; 0 where a code is longer.

    Bits that follow a code are read with it, and need not be among those shown. Of DC codes it is
    one, and its advance 1; of AC codes as many as are shown and advance 62 at most, and the end of
    the block after those.

    Args:
        content_ptr: The files.
        position: Of the table's 16 numbers of codes, by length; the symbols follow.
        end: Of the file.
        lookup_ptr: Where to; int16 [LOOKUP_SIZE].
        codes_ptr: Room for as much.
        is_dc: Whether its symbols are sizes alone.

    Returns:
        Number of symbols; whether libjpeg takes the table (its jdhuff.c).
    """
    # In parts: what a thread holds in registers, others that run beside it cannot.
    for part in range(0, LOOKUP_SIZE, _LOOKUP_PART):
        starts = part + tl.arange(0, _LOOKUP_PART)
        bits = starts << (16 - LOOKUP_BITS)
        length = tl.zeros([_LOOKUP_PART], tl.int32)
        index = tl.zeros([_LOOKUP_PART], tl.int32)
        code = 0
        num_symbols = 0
        for num_bits in range(1, LOOKUP_BITS + 1):
            count = load_byte(content_ptr, position + num_bits - 1, end)
            is_here = (length == 0) & (bits < (code + count) << (16 - num_bits))
            length = tl.where(is_here, num_bits, length)
            index = tl.where(is_here, num_symbols + (bits >> (16 - num_bits)) - code, index)
            code = (code + count) << 1
            num_symbols += count
        is_short = length > 0
        symbol_ptr = content_ptr + position + 16 + index
        symbol = tl.load(symbol_ptr, mask=is_short & (position + 16 + index < end), other=0)
        found = tl.where(is_short, length << 8 | symbol.to(tl.int32), 0)
        tl.store(codes_ptr + starts, found.to(tl.int16))
    tl.debug_barrier()  # what some threads stored, others load
    for part in range(0, LOOKUP_SIZE, _LOOKUP_PART):
        starts = part + tl.arange(0, _LOOKUP_PART)
        num_read = tl.zeros([_LOOKUP_PART], tl.int32)
        advance = tl.zeros([_LOOKUP_PART], tl.int32)
        is_open = starts >= 0
        for _ in range(_MAX_CODES):
            # Zeros stand for bits that are not shown; a code all of which is has none of them.
            shown = (starts << num_read) & (LOOKUP_SIZE - 1)
            found = tl.load(codes_ptr + shown, mask=is_open, other=0).to(tl.int32)
            length = found >> 8
            symbol = found & 0xFF
            further = tl.where(is_dc, 1, advance_of(symbol))
            is_end = further == END_OF_BLOCK
            is_open &= (length > 0) & (num_read + length <= LOOKUP_BITS)
            is_open &= is_end | (advance + further <= _MAX_ADVANCE)
            num_read += tl.where(is_open, length + (symbol & 15), 0)
            advance += tl.where(is_open, further, 0)
            is_open &= (num_read < LOOKUP_BITS) & ~is_end & ~is_dc
        tl.store(lookup_ptr + starts, (advance << 5 | num_read).to(tl.int16))
    tl.debug_barrier()  # before the next table's codes take the place of these
    code = 0
    num_symbols = 0
    is_sound = True
    for num_bits in range(1, 17):
        count = load_byte(content_ptr, position + num_bits - 1, end)
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
def search_code(
    content_ptr: tl.tensor, position: tl.tensor, end: tl.tensor, bits: tl.tensor
) -> tl.tensor:
    """Length << 8 | symbol of the code that 16 bits start with; 0 if it is none.

    Args:
        content_ptr: The files.
        position: Of the table, as for `build_lookup`.
        end: Of the file.
        bits: The 16 bits.
    """
    found = 0
    code = 0
    num_symbols = 0
    for num_bits in range(1, 17):
        count = load_byte(content_ptr, position + num_bits - 1, end)
        start = bits >> (16 - num_bits)
        if found == 0 and start < code + count:
            symbol = load_byte(content_ptr, position + 16 + num_symbols + start - code, end)
            found = num_bits << 8 | symbol
        code = (code + count) << 1
        num_symbols += count
    return found
