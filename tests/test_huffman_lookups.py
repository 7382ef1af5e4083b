"""Lookups of Huffman codes against reading them bit by bit, on the card or in the interpreter."""

import random
from itertools import islice

import pytest
import torch
import triton
import triton.language as tl

from tests.triton_device import DEVICE

from engine.decoding.huffman_lookups import (  # isort: skip
    LOOKUP_BITS,
    LOOKUP_SIZE,
    build_lookup,
    search_code,
)

NUM_BITS, SIZE = LOOKUP_BITS.value, LOOKUP_SIZE.value
# ITU-T T.81, tables K.3 and K.5: numbers of codes by length, symbols.
DC_CODES = [0, 1, 5, 1, 1, 1, 1, 1, 1] + 7 * [0]
DC_SYMBOLS = list(range(12))
AC_CODES = [0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125]
AC_SYMBOLS = bytes.fromhex(
    "01020300041105122131410613516107227114328191a1082342b1c11552d1f024336272820"
    "90a161718191a25262728292a3435363738393a434445464748494a535455565758595a6364"
    "65666768696a737475767778797a838485868788898a92939495969798999aa2a3a4a5a6a7a"
    "8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8"
    "e9eaf1f2f3f4f5f6f7f8f9fa"
)


@triton.jit(do_not_specialize=["is_dc"])  # a constant could not stand for what was loaded
def _built(content_ptr, size, lookup_ptr, codes_ptr, out_ptr, is_dc) -> None:
    num_symbols, is_sound = build_lookup(
        content_ptr, 0, size, lookup_ptr, codes_ptr=codes_ptr, is_dc=is_dc > 0
    )
    tl.store(out_ptr, num_symbols)
    tl.store(out_ptr + 1, is_sound.to(tl.int32))


@triton.jit
def _searched(content_ptr, size, bits_ptr, out_ptr) -> None:
    bits = tl.load(bits_ptr + tl.program_id(0))
    tl.store(out_ptr + tl.program_id(0), search_code(content_ptr, 0, size, bits))


def on_device(table: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(table), dtype=torch.uint8).to(DEVICE)


def built(table: bytes, *, is_dc: bool) -> tuple[list[int], int, bool]:
    lookup, codes = torch.empty(2, SIZE, dtype=torch.int16, device=DEVICE)
    out = torch.empty(2, dtype=torch.int32, device=DEVICE)
    _built[(1,)](on_device(table), len(table), lookup, codes, out, int(is_dc), num_warps=1)
    num_symbols, is_sound = out.tolist()
    return lookup.tolist(), num_symbols, bool(is_sound)


def code_symbols(table: bytes) -> dict[str, int]:
    found, code, symbols = {}, 0, iter(table[16:])
    for length, count in enumerate(table[:16], start=1):
        for symbol in islice(symbols, count):
            found[f"{code:0{length}b}"] = symbol
            code += 1
        code <<= 1
    return found


def read(shown: str, codes: dict[str, int]) -> tuple[str, int] | None:
    """The code that these bits start with, and its symbol."""
    starts = (shown[:length] for length in range(1, len(shown) + 1))
    return next(((start, codes[start]) for start in starts if start in codes), None)


def coefficients(shown: str, codes: dict[str, int]) -> tuple[int, int]:
    """Bits and coefficients of up to four AC codes that are shown, one after the other."""
    num_read = advance = 0
    for _ in range(4):
        found = read(shown[num_read:], codes)
        if found is None:
            break
        code, symbol = found
        is_end = symbol % 16 == 0 and symbol != 0xF0
        further = 65 if is_end else symbol // 16 + 1
        if not is_end and advance + further > 62:
            break
        num_read += len(code) + symbol % 16
        advance += further
        if is_end:
            break
    return num_read, advance


def random_table(seed: int) -> bytes:
    """Of random codes, none of them all ones, and random symbols, many of them 0 or 0xf0."""
    rng = random.Random(seed)
    counts, room = [], 1
    for _ in range(16):
        room = 2 * room
        counts.append(min(rng.choice([0, 1, 2, 5]), room - 1))
        room -= counts[-1]
    symbols = [rng.choice([0, 0xF0, rng.randrange(256)]) for _ in range(sum(counts))]
    return bytes(counts + symbols)


STANDARD_AC = bytes(AC_CODES) + AC_SYMBOLS


TABLES = {"standard": STANDARD_AC} | {f"random {seed}": random_table(seed) for seed in range(3)}
# Short codes of many coefficients: five of them are shown, and four can be more than a block's.
TABLES["far"] = bytes([1, 1, 1, 1, *[0] * 12, 0x01, 0xF0, 0xE1, 0x00])


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_lookup_tells_of_all_ac_codes_that_are_shown(table: bytes) -> None:
    codes = code_symbols(table)
    found, num_symbols, is_sound = built(table, is_dc=False)
    assert (num_symbols, is_sound) == (len(table) - 16, True)
    told = [(entry % 32, entry >> 5) for entry in found]
    assert told == [coefficients(f"{shown:0{NUM_BITS}b}", codes) for shown in range(SIZE)]


def test_several_codes_are_told_of_at_once() -> None:
    # 00 and 01 are coefficients of one and two bits, 1010 is the end of the block.
    found, _, _ = built(STANDARD_AC, is_dc=False)
    assert found[0b00_1_1010_0000] == (1 + 65) << 5 | 7
    assert found[0b00_1_00_0_00_1_01] == 4 << 5 | 13
    assert found[0b11111111010] == 0  # a longer code


def test_a_lookup_tells_of_one_dc_code() -> None:
    table = bytes(DC_CODES + DC_SYMBOLS)
    codes = code_symbols(table)
    found, num_symbols, is_sound = built(table, is_dc=True)
    assert (num_symbols, is_sound) == (12, True)
    for shown, entry in enumerate(found):
        code = read(f"{shown:0{NUM_BITS}b}", codes)
        assert entry == (0 if code is None else 1 << 5 | len(code[0]) + code[1])


def test_tables_that_libjpeg_does_not_take() -> None:
    all_ones = bytes([2] + 15 * [0] + [0, 1])
    large = bytes([1] + 15 * [0] + [16])
    many = bytes(13 * [0] + 3 * [100] + 300 * [0])
    assert built(all_ones, is_dc=False)[1:] == (2, False)
    assert built(large, is_dc=True)[1:] == (1, False)
    assert built(large, is_dc=False)[1:] == (1, True)
    assert built(many, is_dc=False)[1:] == (300, False)


def test_a_search_finds_each_code() -> None:
    codes = code_symbols(STANDARD_AC)
    wanted = [(int(code.ljust(16, "1"), 2), len(code) << 8 | codes[code]) for code in codes]
    wanted += [(0xFFFF, 0)]
    bits = torch.tensor([start for start, _ in wanted], dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(bits)
    size = len(STANDARD_AC)
    _searched[(len(wanted),)](on_device(STANDARD_AC), size, bits, out, num_warps=1)
    assert out.tolist() == [code for _, code in wanted]
