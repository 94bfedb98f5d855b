"""QUIC-FL: its scale, codes, values and exact coordinates."""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.hadamard import (
    largest_magnitude,
    root_mean_square,
    rotate,
    unrotate,
)
from rhtcomm.kernels.triton_kernels.memory import look_up
from rhtcomm.kernels.triton_kernels.order import to_memory, to_threads
from rhtcomm.kernels.triton_kernels.packing import load_codes, store_codes
from rhtcomm.kernels.triton_kernels.streams import draw_dither, draw_signs


@triton.jit
def quic_fl_encode(
    x,
    packed,
    table,
    key,
    hop,
    sixteenth,
    stratum,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    INVERSE_BOUND: tl.constexpr,
    NODES_PER_SIGMA: tl.constexpr,
    MIDDLE: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Stores the codes of x (SIZE,), in thread order, and returns the scale."""
    signs = draw_signs(key, hop, sixteenth, ROTATIONS, SIZE)
    y = rotate(x, signs, ROTATIONS, SIZE, LOG, NEAR, THREADS)
    scale = quic_fl_scale(y, INVERSE_BOUND, CAPACITY, SIZE, LOG, NEAR, THREADS)
    dither = draw_dither(key, hop, sixteenth, stratum, SIZE, NEAR, THREADS)
    if CAPACITY > 0:
        exact = tl.abs(y) * INVERSE_BOUND > scale
        section = packed + BITS * SIZE // 8
        store_exact(y, exact, dither, scale, section, CAPACITY, SIZE, NEAR, THREADS)
        y = tl.where(exact, 0.0, y)
    unit = tl.where(scale > 0, tl.div_rn(1.0, scale) * NODES_PER_SIGMA, 0.0)
    codes = quic_fl_codes(y * unit, dither, table, BITS, MIDDLE, SIZE, NEAR, THREADS)
    store_codes(to_memory(codes, SIZE, NEAR, THREADS), packed, SIZE, BITS, NEAR)
    return scale


@triton.jit
def quic_fl_decode(
    scales,
    packed,
    table,
    key,
    hop,
    sixteenth,
    rank,
    ranks,
    world_size,
    scale_stride,
    code_stride,
    down,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SHARED_BITS: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The sum over ranks of decoded values times `down`, unrotated: (SIZE,) in thread order."""
    dither = draw_dither(key, hop, sixteenth, tl.full([], 0, tl.int32), SIZE, NEAR, THREADS)
    total = quic_fl_values(
        packed, dither, table, rank, world_size, BITS, CAPACITY, SHARED_BITS, SIZE, NEAR, THREADS
    )
    total *= tl.load(scales) * down
    for _ in range(1, ranks):  # the first one is apart, which saves adding to zeros
        scales += scale_stride
        packed += code_stride
        rank += 1
        values = quic_fl_values(
            packed,
            dither,
            table,
            rank,
            world_size,
            BITS,
            CAPACITY,
            SHARED_BITS,
            SIZE,
            NEAR,
            THREADS,
        )
        total += values * (tl.load(scales) * down)
    signs = draw_signs(key, hop, sixteenth, ROTATIONS, SIZE)
    return unrotate(total, signs, ROTATIONS, SIZE, LOG, NEAR, THREADS)


@triton.jit
def quic_fl_scale(
    y,
    INVERSE_BOUND: tl.constexpr,
    CAPACITY: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Of y (SIZE,) in thread order."""
    coded = largest_magnitude(y)
    if CAPACITY > 0:  # the largest but CAPACITY, from the top, equals counted one by one
        # Products have the same order as the magnitudes, and magnitudes that of their bits.
        magnitudes = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        while tl.sum((magnitudes >= coded).to(tl.int32), axis=0) <= CAPACITY:
            coded = tl.max(tl.where(magnitudes < coded, magnitudes, 0), axis=0)
    coded = coded.to(tl.float32, bitcast=True) * INVERSE_BOUND
    return tl.maximum(root_mean_square(y, SIZE, LOG, NEAR, THREADS), coded)


@triton.jit
def quic_fl_codes(
    y,
    dither,
    positions,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    SIZE: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The codes of y (SIZE,), see `QuicFL.encode`: the upper BITS bits of (SIZE,) uint32.

    A code is (position + v) // 2^16. The table has positions times 2^(16 - BITS), so that codes end
    at the top. v is shifted there too; the bits of u that follow it are below those of the
    positions and do not change any code.

    Args:
        y: (SIZE,) in units of 2^-16 of the distance between two nodes of the table.
    """
    u = (dither & 0xFFFF).to(tl.int32, bitcast=True)
    node = (y.to(tl.int32) + (u + MIDDLE)) >> 16
    position = look_up(positions, node, (MIDDLE >> 15) + 1, SIZE, NEAR, THREADS)
    return position.to(tl.uint32, bitcast=True) + (dither >> BITS)


@triton.jit
def quic_fl_values(
    packed,
    dither,
    levels,
    rank,
    world_size,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SHARED_BITS: tl.constexpr,
    SIZE: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The values of a rank's codes, (SIZE,) in thread order, in units of its scale.

    Args:
        dither: (SIZE,) without a stratum; receivers need only the upper byte.
    """
    stratum = (256 * rank).to(tl.uint32, bitcast=True) // world_size.to(tl.uint32)
    shared = ((dither + (stratum << 24)) >> (32 - SHARED_BITS)).to(tl.int32, bitcast=True)
    codes = to_threads(load_codes(packed, SIZE, BITS), SIZE, NEAR, THREADS)
    index = (codes << SHARED_BITS) | shared
    values = look_up(levels, index, 1 << (BITS + SHARED_BITS), SIZE, NEAR, THREADS)
    if CAPACITY > 0:
        values = to_memory(values, SIZE, NEAR, THREADS)
        values = put_exact(values, packed + BITS * SIZE // 8, CAPACITY, SIZE)
        values = to_threads(values, SIZE, NEAR, THREADS)
    return values


@triton.jit
def store_exact(
    y,
    exact,
    dither,
    scale,
    section,
    CAPACITY: tl.constexpr,
    SIZE: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Stores the coordinates that `exact` marks, at most CAPACITY, see `QuicFL.encode_exact`.

    y, exact and dither are (SIZE,) in thread order.
    """
    y = to_memory(y, SIZE, NEAR, THREADS)
    exact = to_memory(exact.to(tl.int32), SIZE, NEAR, THREADS) != 0
    u = to_memory(dither & 0xFFFF, SIZE, NEAR, THREADS)
    indices = section.to(tl.pointer_type(tl.int16))
    values = indices + CAPACITY
    counts = tl.cumsum(exact.to(tl.int32), axis=0)
    z = tl.div_rn(y, tl.zeros_like(y) + scale).to(tl.uint32, bitcast=True)
    rounded = ((z + (u >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True).to(tl.float16)
    tl.store(indices + counts - 1, tl.arange(0, SIZE).to(tl.int16), mask=exact)
    tl.store(values + counts - 1, rounded.to(tl.int16, bitcast=True), mask=exact)
    entry = tl.arange(0, triton.next_power_of_2(CAPACITY))
    unused = (entry >= tl.max(counts, axis=0)) & (entry < CAPACITY)
    tl.store(indices + entry, tl.full(entry.shape, -1, tl.int16), mask=unused)
    tl.store(values + entry, tl.zeros(entry.shape, tl.int16), mask=unused)


@triton.jit
def put_exact(values, section, CAPACITY: tl.constexpr, SIZE: tl.constexpr):
    """values (SIZE,) with the exact coordinates inserted, see `QuicFL.decode_exact`."""
    indices = section.to(tl.pointer_type(tl.int16))
    own = tl.arange(0, SIZE)
    before = tl.full([], -1, tl.int32)
    for entry in range(CAPACITY):
        index = tl.load(indices + entry).to(tl.int32)
        exact = tl.load(indices + CAPACITY + entry).to(tl.float16, bitcast=True).to(tl.float32)
        values = tl.where((own == index) & (index > before), exact, values)
        before = tl.maximum(before, index)
    return values
