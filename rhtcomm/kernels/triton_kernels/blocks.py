"""Whole blocks, one per program: what `gpu` launches."""

import torch
import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.hadamard import (
    powers_of_two,
    root_mean_square,
    rotate,
    unrotate,
)
from rhtcomm.kernels.triton_kernels.memory import load, round_to, store, to_float32
from rhtcomm.kernels.triton_kernels.nearest import eden_nearest, eden_scale, look_up, vector_nearest
from rhtcomm.kernels.triton_kernels.packing import load_codes, store_codes
from rhtcomm.kernels.triton_kernels.quic_fl import (
    put_exact,
    quic_fl_codes,
    quic_fl_scale,
    quic_fl_values,
    store_exact,
)
from rhtcomm.kernels.triton_kernels.streams import draw_dither, shift_dither
from rhtcomm.moments import MOMENTS

__all__ = ["decode_block", "encode_block"]

_MOMENTS = tl.constexpr(MOMENTS)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_VOLATILE = [  # arguments that differ from call to call: no kernels of their own for 1 and 16 k
    *("numel", "offset", "seed_low", "seed_high", "bucket", "step", "hop", "rank", "shift"),
    *("ranks", "scale_stride", "code_stride", "world_size"),
]


def _jit(kernel):
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, do_not_specialize=[name for name in _VOLATILE if name in names])


@triton.jit
def load_block(x, block, numel, moments, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """A block scaled to magnitudes of about 1, the unit that undoes it, and whether it is finite.

    A block that is not finite becomes zeros. Stores its moments, see `block_moments`, unless None.
    """
    index = block * SIZE + tl.arange(0, SIZE)
    x = to_float32(load(x + index, index < numel, WHOLE))
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    down, up, finite = powers_of_two(peak)
    x = tl.where(finite, x * down, 0.0)
    if moments is not None:
        squares = x * x
        to = moments + block * _MOMENTS
        sums = tl.sum(tl.reshape(squares, [SIZE // 8, 8]), axis=0)
        tl.store(to + tl.arange(0, 8), sums)
        tl.store(to + 8, tl.sum(squares * tl.abs(x), axis=0))
        tl.store(to + 9, up)
    return x, up, finite


@_jit
def encode_block(
    x,
    scales,
    packed,
    moments,
    table,
    thresholds,
    numel,
    offset,
    seed_low,
    seed_high,
    bucket,
    step,
    hop,
    rank,
    shift,
    normalization,
    QUANTIZER: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
    BIASED: tl.constexpr,
    INVERSE_BOUND: tl.constexpr,
    NODES_PER_SIGMA: tl.constexpr,
    MIDDLE: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    COUNT: tl.constexpr = SIZE // GROUP
    block = tl.program_id(0).to(tl.int64)
    key = (seed_low, seed_high, bucket, step)
    sixteenth = offset.to(tl.uint32, bitcast=True) + block.to(tl.uint32) * (SIZE // 16)
    x, up, finite = load_block(x, block, numel, moments, SIZE, WHOLE)
    packed += block * (BITS * SIZE // 8 + 4 * CAPACITY)
    y = rotate(x, key, hop + 256 * rank, sixteenth, SIZE, LOG_SIZE, ROTATIONS)
    if QUANTIZER == "QuicFL":
        scale = quic_fl_scale(y, INVERSE_BOUND, CAPACITY, SIZE, LOG_SIZE)
        dither = draw_dither(key, hop, sixteenth, SIZE)
        u, v = shift_dither(dither, shift)
        if CAPACITY > 0:
            exact = tl.abs(y) * INVERSE_BOUND > scale
            store_exact(y, exact, u, scale, packed + BITS * SIZE // 8, CAPACITY, SIZE)
            y = tl.where(exact, 0.0, y)
        codes = quic_fl_codes(y, u, v, scale, table, NODES_PER_SIGMA, MIDDLE)
    else:
        rms = root_mean_square(y, SIZE, LOG_SIZE)
        z = y * tl.where(rms > 0, tl.div_rn(1.0, rms), 0.0)
        if QUANTIZER == "Eden":
            codes = eden_nearest(z, thresholds, BITS)
        else:
            codes = vector_nearest(tl.reshape(z, [COUNT, GROUP]), table, thresholds, COUNT, GROUP)
        scale = eden_scale(rms, z, look_up(codes, table, COUNT, GROUP), BIASED, SIZE, LOG_SIZE)
    store_codes(codes, packed, COUNT, BITS * GROUP)
    scale = scale * normalization * up
    scale = tl.where(scale > _LARGEST, _LARGEST, scale)
    tl.store(scales + block, tl.where(finite, scale, float("nan")))


@triton.jit
def largest_scale(scales, ranks, scale_stride):
    """The bits of the largest magnitude among those that the ranks sent of a block."""
    largest = tl.full([], 0, tl.int32)
    for _ in range(ranks):
        largest = tl.maximum(largest, tl.load(scales).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        scales += scale_stride
    return largest


@_jit
def decode_block(
    scales,
    packed,
    out,
    table,
    numel,
    offset,
    seed_low,
    seed_high,
    bucket,
    step,
    hop,
    rank,
    ranks,
    scale_stride,
    code_stride,
    world_size,
    normalization,
    QUANTIZER: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
    SHARED_BITS: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    key = (seed_low, seed_high, bucket, step)
    sixteenth = offset.to(tl.uint32, bitcast=True) + block.to(tl.uint32) * (SIZE // 16)
    packed += block * (BITS * SIZE // 8 + 4 * CAPACITY)
    scales += block
    down, up, finite = powers_of_two(largest_scale(scales, ranks, scale_stride))
    if QUANTIZER == "QuicFL":
        dither = draw_dither(key, hop, sixteenth, SIZE) >> 24  # all that receivers need
    # Adding to -0 changes no value, not even -0.
    total = tl.full([SIZE], -(1 << 31), tl.int32).to(tl.float32, bitcast=True)
    for _ in range(ranks):
        factor = tl.load(scales) * down
        codes = load_codes(packed, SIZE // GROUP, BITS * GROUP)
        if QUANTIZER == "QuicFL":
            values = quic_fl_values(codes, dither, table, rank, world_size, SHARED_BITS)
            if CAPACITY > 0:
                values = put_exact(values, packed + BITS * SIZE // 8, CAPACITY, SIZE)
            total += values * factor
        else:
            values = look_up(codes, table, SIZE // GROUP, GROUP) * factor
            purpose = hop + 256 * rank
            total += unrotate(values, key, purpose, sixteenth, SIZE, LOG_SIZE, ROTATIONS)
        scales += scale_stride
        packed += code_stride
        rank += 1
    if QUANTIZER == "QuicFL":
        total = unrotate(total, key, hop, sixteenth, SIZE, LOG_SIZE, ROTATIONS)
    mean = tl.where(finite, total * normalization * up, float("nan"))
    index = block * SIZE + tl.arange(0, SIZE)
    store(out + index, round_to(mean, out.dtype.element_ty), index < numel, WHOLE)
