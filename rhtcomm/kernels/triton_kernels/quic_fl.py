"""QUIC-FL: its scale, codes, values and exact coordinates."""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.hadamard import root_mean_square


@triton.jit
def quic_fl_scale(
    y, INVERSE_BOUND: tl.constexpr, CAPACITY: tl.constexpr, SIZE: tl.constexpr, LOG: tl.constexpr
):
    # Magnitudes have the order of their bits, and their products that of the magnitudes.
    magnitudes = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    coded = tl.max(magnitudes, axis=0)
    if CAPACITY > 0:  # the largest but CAPACITY, from the top, equals counted one by one
        while tl.sum((magnitudes >= coded).to(tl.int32), axis=0) <= CAPACITY:
            coded = tl.max(tl.where(magnitudes < coded, magnitudes, 0), axis=0)
    coded = coded.to(tl.float32, bitcast=True) * INVERSE_BOUND
    return tl.maximum(root_mean_square(y, SIZE, LOG), coded)


@triton.jit
def quic_fl_codes(y, u, v, scale, positions, NODES_PER_SIGMA: tl.constexpr, MIDDLE: tl.constexpr):
    """y, u and v (SIZE,) -> codes (SIZE,) int32, see `QuicFL.encode`."""
    unit = tl.where(scale > 0, tl.div_rn(1.0, scale) * NODES_PER_SIGMA, 0.0)
    node = ((y * unit).to(tl.int32) + (u.to(tl.int32) + MIDDLE)) >> 16
    return (tl.load(positions + node) + v.to(tl.int32)) >> 16


@triton.jit
def quic_fl_values(codes, dither, levels, rank, world_size, SHARED_BITS: tl.constexpr):
    """What the codes (SIZE,) of a rank stand for; dither (SIZE,) is the upper byte of v."""
    stratum = (256 * rank).to(tl.uint32, bitcast=True) // world_size.to(tl.uint32)
    shared = ((dither + stratum) & 0xFF) >> (8 - SHARED_BITS)
    return tl.load(levels + ((codes << SHARED_BITS) | shared.to(tl.int32)))


@triton.jit
def store_exact(y, exact, u, scale, section, CAPACITY: tl.constexpr, SIZE: tl.constexpr):
    """Stores the coordinates that `exact` marks, at most CAPACITY, see `QuicFL.encode_exact`."""
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
    """values (SIZE,) with the exact coordinates put in, see `QuicFL.decode_exact`."""
    indices = section.to(tl.pointer_type(tl.int16))
    own = tl.arange(0, SIZE)
    before = tl.full([], -1, tl.int32)
    for entry in range(CAPACITY):
        index = tl.load(indices + entry).to(tl.int32)
        exact = tl.load(indices + CAPACITY + entry).to(tl.float16, bitcast=True).to(tl.float32)
        values = tl.where((own == index) & (index > before), exact, values)
        before = tl.maximum(before, index)
    return values
