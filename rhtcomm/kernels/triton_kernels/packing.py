"""Packed codes.

The field of width w follows the wider ones, of BITS & -2 w bits in all, in a code and in the bytes
of a block.
"""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.hadamard import wrap


@triton.jit
def store_field(codes, to, COUNT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    if BITS & WIDTH:
        BEFORE: tl.constexpr = BITS & (-2 * WIDTH)
        LANES: tl.constexpr = 8 // WIDTH
        field = tl.reshape((codes >> BEFORE) & ((1 << WIDTH) - 1), [LANES, COUNT // LANES])
        octets = tl.sum(field << (WIDTH * tl.arange(0, LANES))[:, None], axis=0)
        octets = tl.reshape(octets, [COUNT // LANES // 4, 4])
        words = wrap(tl.sum(octets << (8 * tl.arange(0, 4))[None, :], axis=1))
        tl.store(to + BEFORE * COUNT // 32 + tl.arange(0, COUNT // LANES // 4), words)


@triton.jit
def store_codes(codes, to, COUNT: tl.constexpr, BITS: tl.constexpr):
    """codes (COUNT,) int32 -> COUNT BITS / 8 bytes, see `rhtcomm.bitpack`.

    The codes of a block begin at a multiple of 4 bytes and no more, so words are written and read.
    """
    to = to.to(tl.pointer_type(tl.int32))
    store_field(codes, to, COUNT, BITS, 8)
    store_field(codes, to, COUNT, BITS, 4)
    store_field(codes, to, COUNT, BITS, 2)
    store_field(codes, to, COUNT, BITS, 1)


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
