"""EDEN and the vector quantizer: nearest centroids and codewords."""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.hadamard import (
    root_mean_square,
    rotate,
    tree_sum,
    unrotate,
    wrap,
)
from rhtcomm.kernels.triton_kernels.memory import look_up
from rhtcomm.kernels.triton_kernels.order import to_memory, to_threads
from rhtcomm.kernels.triton_kernels.packing import load_codes, store_codes
from rhtcomm.kernels.triton_kernels.streams import draw_signs


@triton.jit
def nearest_encode(
    x,
    packed,
    table,
    thresholds,
    key,
    purpose,
    sixteenth,
    QUANTIZER: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BIASED: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Stores the codes of x (SIZE,), in thread order, and returns the scale."""
    COUNT: tl.constexpr = SIZE // GROUP
    signs = draw_signs(key, purpose, sixteenth, ROTATIONS, SIZE)
    y = rotate(x, signs, ROTATIONS, SIZE, LOG, NEAR, THREADS)
    rms = root_mean_square(y, SIZE, LOG, NEAR, THREADS)
    z = y * tl.where(rms > 0, tl.div_rn(1.0, rms), 0.0)
    in_memory = to_memory(z, SIZE, NEAR, THREADS)
    if QUANTIZER == "Eden":
        codes = eden_nearest(in_memory, thresholds, BITS)
    else:
        groups = tl.reshape(in_memory, [COUNT, GROUP])
        codes = vector_nearest(groups, table, thresholds, COUNT, GROUP)
    upper = codes.to(tl.uint32, bitcast=True) << (32 - BITS * GROUP)
    store_codes(upper, packed, COUNT, BITS * GROUP, NEAR // GROUP)
    values = look_up_groups(codes, table, BITS * GROUP, COUNT, GROUP, NEAR, THREADS)
    return eden_scale(rms, z, values, BIASED, SIZE, LOG, NEAR, THREADS)


@triton.jit
def nearest_decode(
    scales,
    packed,
    table,
    key,
    hop,
    sixteenth,
    rank,
    ranks,
    scale_stride,
    code_stride,
    down,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The sum over ranks of decoded values times `down`, each unrotated: (SIZE,) in thread
    order."""
    COUNT: tl.constexpr = SIZE // GROUP
    # Adding to -0 does not change any value, not even -0.
    total = tl.full([SIZE], -(1 << 31), tl.int32).to(tl.float32, bitcast=True)
    for _ in range(ranks):
        factor = tl.load(scales) * down
        codes = load_codes(packed, COUNT, BITS * GROUP)
        values = look_up_groups(codes, table, BITS * GROUP, COUNT, GROUP, NEAR, THREADS)
        signs = draw_signs(key, hop + 256 * rank, sixteenth, ROTATIONS, SIZE)
        total += unrotate(values * factor, signs, ROTATIONS, SIZE, LOG, NEAR, THREADS)
        scales += scale_stride
        packed += code_stride
        rank += 1
    return total


@triton.jit
def eden_nearest(z, boundaries, BITS: tl.constexpr):
    """The number of boundaries <= z, by bisection."""
    codes = tl.zeros_like(z).to(tl.int32)
    for digit in tl.static_range(BITS):
        middle = codes + (1 << (BITS - 1 - digit))
        codes = tl.where(z >= tl.load(boundaries + middle - 1), middle, codes)
    return codes


@triton.jit
def coordinate(z, COUNT: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr):
    """Coordinate INDEX of each group, z (COUNT, GROUP) -> (COUNT,); adds nothing but zeros."""
    bits = tl.where(tl.arange(0, GROUP)[None, :] == INDEX, z.to(tl.int32, bitcast=True), 0)
    return wrap(tl.sum(bits, axis=1)).to(tl.float32, bitcast=True)


@triton.jit
def vector_nearest(z, codewords, half_norms, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """z (COUNT, GROUP) -> codes (COUNT,), see `VectorQuantizer`."""
    z0 = coordinate(z, COUNT, GROUP, 0)
    z1 = coordinate(z, COUNT, GROUP, 1)
    if GROUP > 2:
        z2 = coordinate(z, COUNT, GROUP, 2)
        z3 = coordinate(z, COUNT, GROUP, 3)
    if GROUP > 4:
        z4 = coordinate(z, COUNT, GROUP, 4)
        z5 = coordinate(z, COUNT, GROUP, 5)
        z6 = coordinate(z, COUNT, GROUP, 6)
        z7 = coordinate(z, COUNT, GROUP, 7)
    best = tl.full([COUNT], float("-inf"), tl.float32)
    codes = tl.zeros([COUNT], tl.int32)
    for i in range(128):
        codeword = codewords + GROUP * i
        dot = z0 * tl.load(codeword) + z1 * tl.load(codeword + 1)
        if GROUP > 2:
            dot = dot + z2 * tl.load(codeword + 2)
            dot = dot + z3 * tl.load(codeword + 3)
        if GROUP > 4:
            dot = dot + z4 * tl.load(codeword + 4)
            dot = dot + z5 * tl.load(codeword + 5)
            dot = dot + z6 * tl.load(codeword + 6)
            dot = dot + z7 * tl.load(codeword + 7)
        score = tl.abs(dot) - tl.load(half_norms + i)
        codes = tl.where(score > best, tl.where(dot < 0, 128 + i, i), codes)
        best = tl.maximum(best, score)
    return codes


@triton.jit
def look_up_groups(
    codes,
    table,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The values of codes (COUNT,) of BITS bits, in memory order: GROUP entries each.

    Returns:
        (COUNT GROUP,) float32 in thread order.
    """
    SIZE: tl.constexpr = COUNT * GROUP
    index = codes[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    index = to_threads(tl.reshape(index, [SIZE]), SIZE, NEAR, THREADS)
    return look_up(table, index, GROUP << BITS, SIZE, NEAR, THREADS)


@triton.jit
def eden_scale(
    rms,
    z,
    values,
    BIASED: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Of z and its values, both (SIZE,) in thread order."""
    agreement = tree_sum(z * values, SIZE, LOG, NEAR, THREADS)
    if BIASED:
        correction = tl.div_rn(agreement, tree_sum(values * values, SIZE, LOG, NEAR, THREADS))
    else:
        correction = tl.div_rn(tree_sum(z * z, SIZE, LOG, NEAR, THREADS), agreement)
    return tl.where(rms > 0, rms * correction, 0.0)
