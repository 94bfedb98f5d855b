"""EDEN and the vector quantizer: nearest centroids and codewords."""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.hadamard import tree_sum, wrap


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
def look_up(codes, table, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """What codes (COUNT,) stand for, (COUNT GROUP,) float32: GROUP entries of a table per code."""
    index = codes[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.load(table + tl.reshape(index, [COUNT * GROUP]))


@triton.jit
def eden_scale(rms, z, values, BIASED: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    agreement = tree_sum(z * values, SIZE, LOG_SIZE)
    if BIASED:
        correction = tl.div_rn(agreement, tree_sum(values * values, SIZE, LOG_SIZE))
    else:
        correction = tl.div_rn(tree_sum(z * z, SIZE, LOG_SIZE), agreement)
    return tl.where(rms > 0, rms * correction, 0.0)
