"""The lattice's steps, one program per block: what `lattice_gpu` launches."""

import triton
import triton.language as tl

from rhtcomm.kernels.lattice import NOT_FINITE, ZERO
from rhtcomm.kernels.triton_kernels.blocks import jit, load_block, store_mean
from rhtcomm.kernels.triton_kernels.hadamard import largest_magnitude, rotate, unrotate
from rhtcomm.kernels.triton_kernels.order import to_memory, to_threads
from rhtcomm.kernels.triton_kernels.streams import draw_dither, draw_signs, sixteenth_of

__all__ = ["mean_block", "pack_block", "quantize_block", "rotate_block"]

_ZERO, _NOT_FINITE = tl.constexpr(ZERO), tl.constexpr(NOT_FINITE)


@triton.jit
def power_of_two(exponent):
    """2^exponent of -126 .. 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_bound(bound):
    """Mantissa and exponent of a bound (else 1 and 0), and whether it is that of an M > 0."""
    usable = (bound != _ZERO) & (bound != _NOT_FINITE)
    bound = tl.where(usable, bound, 0)
    mantissa = ((bound & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return mantissa, bound >> 23, usable


@jit
def rotate_block(
    x,
    y,
    exponents,
    bounds,
    numel,
    offset,
    seed_low,
    seed_high,
    bucket,
    step,
    hop,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    WARPS: tl.constexpr,
):
    NEAR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # 16 bytes
    THREADS: tl.constexpr = min(32 * WARPS, SIZE // NEAR)
    block = tl.program_id(0).to(tl.int64)
    signs = draw_signs(
        (seed_low, seed_high, bucket, step), hop, sixteenth_of(offset, block, SIZE), ROTATIONS, SIZE
    )
    x, up, finite = load_block(x, block, numel, None, SIZE, WHOLE)
    x = to_threads(x, SIZE, NEAR, THREADS)
    x = rotate(x, signs, ROTATIONS, SIZE, LOG_SIZE, NEAR, THREADS)
    tl.store(y + block * SIZE + tl.arange(0, SIZE), to_memory(x, SIZE, NEAR, THREADS))
    peak = largest_magnitude(x)
    exponent = (up.to(tl.int32, bitcast=True) >> 23) - 127
    bound = tl.where(peak > 0, peak + ((exponent - 127) << 23), _ZERO)
    tl.store(exponents + block, exponent)
    tl.store(bounds + block, tl.where(finite, bound, _NOT_FINITE))


@jit
def quantize_block(
    y,
    exponents,
    bounds,
    codes,
    offset,
    seed_low,
    seed_high,
    bucket,
    step,
    hop,
    stratum,
    BITS: tl.constexpr,
    PER_STEP: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Writes a byte for each coordinate; `pack_block` makes words of them."""
    NEAR: tl.constexpr = 4
    THREADS: tl.constexpr = min(32 * WARPS, SIZE // NEAR)
    MIDDLE: tl.constexpr = ((1 << BITS) - 1) * 32768
    block = tl.program_id(0).to(tl.int64)
    key = (seed_low, seed_high, bucket, step)
    sixteenth = sixteenth_of(offset, block, SIZE)
    mantissa, exponent, usable = split_bound(tl.load(bounds + block))
    exponent = tl.maximum(tl.load(exponents + block) - exponent, -126)
    exponent = tl.where(usable, exponent, 0)
    unit = tl.div_rn(1.0, mantissa) * PER_STEP * power_of_two(exponent)
    unit = tl.where(usable, unit, 0.0)
    at = block * SIZE + tl.arange(0, SIZE)
    z = (tl.load(y + at) * unit).to(tl.int32)
    words = draw_dither(key, hop, sixteenth, tl.full([], 0, tl.int32), SIZE, NEAR, THREADS)
    v = ((to_memory(words, SIZE, NEAR, THREADS) >> 16).to(tl.int32) + stratum) & 0xFFFF
    tl.store(codes + at, ((z + MIDDLE + v) >> 16).to(tl.uint8))


@jit
def pack_block(codes, words, M: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Lane i of word j of M has the code of coordinate i M + j."""
    block = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, triton.next_power_of_2(M))
    word = tl.full([triton.next_power_of_2(M)], 0, tl.uint32)
    for lane in tl.static_range(32 // WIDTH):
        index = lane * M + j
        mask = (j < M) & (index < SIZE)
        code = tl.load(codes + block * SIZE + index, mask=mask, other=0)
        word |= code.to(tl.uint32) << (lane * WIDTH)
    tl.store(words + block * M + j, word.to(tl.int32, bitcast=True), mask=j < M)


@jit
def mean_block(
    words,
    bounds,
    out,
    numel,
    offset,
    seed_low,
    seed_high,
    bucket,
    step,
    hop,
    world_size,
    half,
    rest,
    unit,
    normalization,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    WARPS: tl.constexpr,
):
    NEAR: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # 16 bytes
    THREADS: tl.constexpr = min(32 * WARPS, SIZE // NEAR)
    block = tl.program_id(0).to(tl.int64)
    key = (seed_low, seed_high, bucket, step)
    sixteenth = sixteenth_of(offset, block, SIZE)
    index = tl.arange(0, SIZE)
    word = tl.load(words + block * M + index % M).to(tl.uint32, bitcast=True)
    MASK: tl.constexpr = (1 << WIDTH) - 1
    total = (word >> (index // M * WIDTH).to(tl.uint32)) & MASK
    total = (total - half.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
    total = to_threads(total, SIZE, NEAR, THREADS)
    drawn = draw_dither(key, hop, sixteenth, tl.full([], 0, tl.int32), SIZE, NEAR, THREADS)
    drawn = ((drawn >> 16) * world_size.to(tl.uint32, bitcast=True)) & 0xFFFF
    y = total.to(tl.float32) * 65536.0 + (rest - drawn.to(tl.int32).to(tl.float32))
    signs = draw_signs(key, hop, sixteenth, ROTATIONS, SIZE)
    y = unrotate(y * unit, signs, ROTATIONS, SIZE, LOG_SIZE, NEAR, THREADS)
    bound = tl.load(bounds + block)
    mantissa, exponent, usable = split_bound(bound)
    usual = tl.minimum(tl.maximum(exponent, -126), 127)
    factor = mantissa * normalization * power_of_two(exponent - usual)
    y = tl.where(usable, y, 0.0)
    finite = bound != _NOT_FINITE
    # fmt: off
    store_mean(
        y, out, block, numel, factor, power_of_two(usual), finite, False, SIZE, NEAR, THREADS, WHOLE
    )
    # fmt: on
