"""Whole blocks, one per program: what `gpu` launches."""

import torch
import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.hadamard import largest_magnitude, powers_of_two
from rhtcomm.kernels.triton_kernels.memory import load, nan_of, round_to, store, to_float32
from rhtcomm.kernels.triton_kernels.nearest import nearest_decode, nearest_encode
from rhtcomm.kernels.triton_kernels.order import to_memory, to_threads
from rhtcomm.kernels.triton_kernels.quic_fl import quic_fl_decode, quic_fl_encode
from rhtcomm.kernels.triton_kernels.streams import sixteenth_of
from rhtcomm.moments import MOMENTS

__all__ = ["decode_block", "encode_block"]

_MOMENTS = tl.constexpr(MOMENTS)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_VOLATILE = [  # arguments that differ from call to call: no kernels of their own for 1 and 16 k
    *("numel", "offset", "seed_low", "seed_high", "bucket", "step", "hop", "rank", "stratum"),
    *("ranks", "scale_stride", "code_stride", "world_size"),
    *("unit_bytes", "steps", "room", "column_stride", "half"),
]


def jit(kernel):
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, do_not_specialize=[name for name in _VOLATILE if name in names])


@triton.jit
def load_block(x, block, numel, moments, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """A block scaled to magnitudes of about 1, the inverse scale, and whether the block is finite.

    A non-finite block becomes zeros. Stores the block's moments, see `block_moments`, unless None.
    """
    index = block * SIZE + tl.arange(0, SIZE)
    at = x + index
    x = to_float32(load(at, index < numel, WHOLE))
    down, up, finite = powers_of_two(largest_magnitude(x))
    x *= down
    # A fully masked load gives the zeros: with constants the compiler would add a selection per
    # coordinate; a load stays in a branch.
    if not finite:
        x = to_float32(load(at, index < 0, False))
    if moments is not None:
        squares = x * x
        to = moments + block * _MOMENTS
        sums = tl.sum(tl.reshape(squares, [SIZE // 8, 8]), axis=0)
        tl.store(to + tl.arange(0, 8), sums)
        tl.store(to + 8, tl.sum(squares * tl.abs(x), axis=0))
        tl.store(to + 9, up)
    return x, up, finite


@triton.jit
def store_scale(to, scale, normalization, up, finite):
    scale = scale * normalization * up
    scale = tl.where(scale > _LARGEST, _LARGEST, scale)
    tl.store(to, tl.where(finite, scale, float("nan")))


@triton.jit
def store_mean(
    total,
    out,
    block,
    numel,
    normalization,
    up,
    finite,
    NAN: tl.constexpr,
    SIZE: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Stores total (SIZE,), in thread order, times the remaining factors; NAN: whether it may hold
    NaN."""
    dtype: tl.constexpr = out.dtype.element_ty
    # `where` does not change any result, since non-finite values are not stored. It makes a scalar
    # that stays in a register; an argument would be loaded at each use.
    mean = to_memory(total * tl.where(finite, normalization, 0.0) * up, SIZE, NEAR, THREADS)
    index = block * SIZE + tl.arange(0, SIZE)
    if finite:
        store(out + index, round_to(mean, dtype, NAN), index < numel, WHOLE)
    else:
        store(out + index, tl.broadcast_to(nan_of(dtype), [SIZE]), index < numel, WHOLE)


@jit
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
    stratum,
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
    WARPS: tl.constexpr,
):
    NEAR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # 16 bytes
    THREADS: tl.constexpr = min(32 * WARPS, SIZE // NEAR)
    block = tl.program_id(0).to(tl.int64)
    key = (seed_low, seed_high, bucket, step)
    sixteenth = sixteenth_of(offset, block, SIZE)
    x, up, finite = load_block(x, block, numel, moments, SIZE, WHOLE)
    x = to_threads(x, SIZE, NEAR, THREADS)
    packed += block * (BITS * SIZE // 8 + 4 * CAPACITY)
    # fmt: off
    if QUANTIZER == "QuicFL":
        scale = quic_fl_encode(
            x, packed, table, key, hop, sixteenth, stratum, BITS, CAPACITY, INVERSE_BOUND,
            NODES_PER_SIGMA, MIDDLE, ROTATIONS, SIZE, LOG_SIZE, NEAR, THREADS,
        )
    else:
        scale = nearest_encode(
            x, packed, table, thresholds, key, hop + 256 * rank, sixteenth, QUANTIZER, BITS, GROUP,
            BIASED, ROTATIONS, SIZE, LOG_SIZE, NEAR, THREADS,
        )
    # fmt: on
    store_scale(scales + block, scale, normalization, up, finite)


@triton.jit
def largest_scale(scales, ranks, scale_stride):
    """The bits of the largest scale of a block over the ranks."""
    largest = tl.full([], 0, tl.int32)
    for _ in range(ranks):
        largest = tl.maximum(largest, tl.load(scales).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        scales += scale_stride
    return largest


@jit
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
    WARPS: tl.constexpr,
):
    NEAR: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # 16 bytes
    THREADS: tl.constexpr = min(32 * WARPS, SIZE // NEAR)
    block = tl.program_id(0).to(tl.int64)
    key = (seed_low, seed_high, bucket, step)
    sixteenth = sixteenth_of(offset, block, SIZE)
    packed += block * (BITS * SIZE // 8 + 4 * CAPACITY)
    scales += block
    down, up, finite = powers_of_two(largest_scale(scales, ranks, scale_stride))
    # fmt: off
    if QUANTIZER == "QuicFL":
        total = quic_fl_decode(
            scales, packed, table, key, hop, sixteenth, rank, ranks, world_size, scale_stride,
            code_stride, down, BITS, CAPACITY, SHARED_BITS, ROTATIONS, SIZE, LOG_SIZE, NEAR,
            THREADS,
        )
    else:
        total = nearest_decode(
            scales, packed, table, key, hop, sixteenth, rank, ranks, scale_stride, code_stride,
            down, BITS, GROUP, ROTATIONS, SIZE, LOG_SIZE, NEAR, THREADS,
        )
    # fmt: on
    NAN: tl.constexpr = CAPACITY > 0  # coordinates that travel exactly may be anything
    # fmt: off
    store_mean(
        total, out, block, numel, normalization, up, finite, NAN, SIZE, NEAR, THREADS, WHOLE
    )
    # fmt: on
