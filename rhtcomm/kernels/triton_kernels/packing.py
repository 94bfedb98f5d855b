"""Packed codes, see `rhtcomm.bitpack`.

The field of width w follows the wider ones, of BITS & -2 w bits in all, in a code and in the bytes
of a block. A byte holds fields of coordinates that are COUNT w / 8 apart, and is one of 4 in a
word. The codes of a block are aligned only to 4 bytes, so words are written and read.
"""

import triton
import triton.language as tl


@triton.jit
def columns_of(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x (ROWS, COLUMNS): a tuple of its columns, (ROWS,) each."""
    if COLUMNS == 1:
        return (tl.reshape(x, [ROWS]),)
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, COLUMNS // 2, 2]))
        evens = columns_of(even, ROWS, COLUMNS // 2)
        odds = columns_of(odd, ROWS, COLUMNS // 2)
        columns = ()
        for pair in tl.static_range(COLUMNS // 2):
            columns += (evens[pair], odds[pair])  # type: ignore[assignment]
        return columns


@triton.jit
def join_runs(runs, RUNS: tl.constexpr, WORDS: tl.constexpr):
    """A tuple of RUNS tensors (WORDS,), concatenated: (RUNS WORDS,)."""
    if RUNS == 1:
        return runs[0]
    elif RUNS == 2:
        return tl.reshape(tl.permute(tl.join(runs[0], runs[1]), (1, 0)), [2 * WORDS])
    else:
        pairs = tl.join(tl.join(runs[0], runs[2]), tl.join(runs[1], runs[3]))
        return tl.reshape(tl.permute(pairs, (1, 2, 0)), [4 * WORDS])


@triton.jit
def store_field(
    codes,
    to,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """codes: a tuple of 4 PARTS tensors, PARTS for each byte of a word."""
    if BITS & WIDTH:
        BEFORE: tl.constexpr = BITS & (-2 * WIDTH)
        LANES: tl.constexpr = 8 // WIDTH
        RUNS: tl.constexpr = PARTS // LANES
        WORDS: tl.constexpr = COUNT // (4 * PARTS)
        runs = ()
        for run in tl.static_range(RUNS):
            word = tl.zeros([WORDS], tl.uint32)
            for octet in tl.static_range(4):  # from the last to the first
                for lane in tl.static_range(LANES):
                    code = codes[4 * ((LANES - 1 - lane) * RUNS + run) + 3 - octet]
                    # One instruction shifts the upper bits of one register into another.
                    word = (word << WIDTH) | ((code << (BITS - BEFORE - WIDTH)) >> (32 - WIDTH))
            word = tl.permute(tl.reshape(word, [BESIDE, WORDS // BESIDE]), (1, 0))
            runs += (tl.reshape(word, [WORDS]),)  # type: ignore[assignment]
        index = tl.arange(0, COUNT * WIDTH // 32)
        tl.store(to + BEFORE * COUNT // 32 + index, join_runs(runs, RUNS, WORDS))


@triton.jit
def store_codes(codes, to, COUNT: tl.constexpr, BITS: tl.constexpr, NEAR: tl.constexpr):
    """The upper BITS bits of codes (COUNT,) uint32, in memory order -> COUNT BITS / 8 bytes.

    Codes are split into as many parts as a byte holds fields of the narrowest width, for all fields
    alike: otherwise the compiler would rearrange registers, and recompute all codes, for each
    field.
    """
    to = to.to(tl.pointer_type(tl.uint32))
    PARTS: tl.constexpr = 8 // (BITS & -BITS)
    WORDS: tl.constexpr = COUNT // (4 * PARTS)
    BESIDE: tl.constexpr = min(max(NEAR // 4, 1), WORDS)  # words of a thread, one after the other
    parts = tl.permute(tl.reshape(codes, [PARTS, WORDS // BESIDE, BESIDE, 4]), (2, 1, 0, 3))
    parts = columns_of(tl.reshape(parts, [WORDS, 4 * PARTS]), WORDS, 4 * PARTS)
    for log in tl.static_range(4):
        store_field(parts, to, COUNT, BITS, 8 >> log, PARTS, BESIDE)


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
