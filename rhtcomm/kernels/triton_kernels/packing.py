"""Packed codes, see `rhtcomm.bitpack`.

The field of width w follows the wider ones, of BITS & -2 w bits in all, in a code and in the bytes
of a block. A byte holds fields of coordinates that are COUNT w / 8 apart, and is one of 4 in a
word. The codes of a block begin at a multiple of 4 bytes and no more, so words are written and
read. Next to each other lie NEAR // 4 words of one thread.
"""

import triton
import triton.language as tl


@triton.jit
def push(word, fields, FIELDS: tl.constexpr, WIDTH: tl.constexpr):
    """Pushes the upper WIDTH bits of fields (words, FIELDS) into words from below, the last first.

    One instruction for each, since a funnel shift takes the upper bits of one register into the
    lower ones of another.
    """
    if FIELDS == 1:
        return (word << WIDTH) | (tl.reshape(fields, word.shape) >> (32 - WIDTH))
    else:
        halves = tl.reshape(fields, [word.shape[0], 2, FIELDS // 2])
        first, last = tl.split(tl.permute(halves, (0, 2, 1)))
        word = push(word, last, FIELDS // 2, WIDTH)
        return push(word, first, FIELDS // 2, WIDTH)


@triton.jit
def store_field(
    codes, to, COUNT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, NEAR: tl.constexpr
):
    if BITS & WIDTH:
        BEFORE: tl.constexpr = BITS & (-2 * WIDTH)
        LANES: tl.constexpr = 8 // WIDTH
        WORDS: tl.constexpr = COUNT // LANES // 4
        BESIDE: tl.constexpr = min(max(NEAR // 4, 1), WORDS)
        fields = tl.reshape(
            codes << (BITS - BEFORE - WIDTH), [LANES, WORDS // BESIDE, BESIDE, 2, 2]
        )
        even, odd = tl.split(tl.permute(fields, (2, 1, 0, 3, 4)))
        octet0, octet2 = tl.split(even)
        octet1, octet3 = tl.split(odd)
        words = push(tl.zeros([WORDS], tl.uint32), octet3, LANES, WIDTH)
        words = push(words, octet2, LANES, WIDTH)
        words = push(words, octet1, LANES, WIDTH)
        words = push(words, octet0, LANES, WIDTH)
        words = tl.permute(tl.reshape(words, [BESIDE, WORDS // BESIDE]), (1, 0))
        tl.store(to + BEFORE * COUNT // 32 + tl.arange(0, WORDS), tl.reshape(words, [WORDS]))


@triton.jit
def store_codes(codes, to, COUNT: tl.constexpr, BITS: tl.constexpr, NEAR: tl.constexpr):
    """The upper BITS bits of codes (COUNT,) uint32, in memory order -> COUNT BITS / 8 bytes."""
    to = to.to(tl.pointer_type(tl.uint32))
    store_field(codes, to, COUNT, BITS, 8, NEAR)
    store_field(codes, to, COUNT, BITS, 4, NEAR)
    store_field(codes, to, COUNT, BITS, 2, NEAR)
    store_field(codes, to, COUNT, BITS, 1, NEAR)


@triton.jit
def load_field(codes, packed, COUNT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    if BITS & WIDTH:
        BEFORE: tl.constexpr = BITS & (-2 * WIDTH)
        LANES: tl.constexpr = 8 // WIDTH
        words = packed + BEFORE * COUNT // 32 + tl.arange(0, COUNT // LANES // 4)
        octets = tl.load(words)[:, None] >> (8 * tl.arange(0, 4))[None, :]
        octets = tl.reshape(octets, [1, COUNT // LANES])
        field = (octets >> (WIDTH * tl.arange(0, LANES))[:, None]) & ((1 << WIDTH) - 1)
        codes |= tl.reshape(field, [COUNT]) << BEFORE
    return codes


@triton.jit
def load_codes(packed, COUNT: tl.constexpr, BITS: tl.constexpr):
    packed = packed.to(tl.pointer_type(tl.int32))
    codes = tl.zeros([COUNT], tl.int32)
    codes = load_field(codes, packed, COUNT, BITS, 8)
    codes = load_field(codes, packed, COUNT, BITS, 4)
    codes = load_field(codes, packed, COUNT, BITS, 2)
    return load_field(codes, packed, COUNT, BITS, 1)
