"""The Triton kernels: one program a block, bit for bit the reference.

A block is read once, stays in registers through scaling, transforms and quantization, and leaves as
packed codes; decoding goes the other way. So a bucket crosses memory once a direction. How many
warps a program has is set for blocks of 4096, and measured on the device for others.

The bits of the reference (rhtcomm/kernels/__init__.py) forbid what compilers like to do:
multiplications are not fused with additions (`enable_fp_fusion=False`, which goes down to ptxas;
without it Triton sets no fast-math flag), divisions and square roots are asked for correctly
rounded (`/` and `tl.sqrt` are not), and sums of floats go by pairs, since `tl.sum` over more than
two leaves the order to the layout.

With TRITON_INTERPRET=1, set before Triton is imported, the same code runs on CPU tensors in NumPy.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from threading import Lock
from typing import Any

import numpy.typing as npt
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources, PTXASError

from rhtcomm.floating_point import default_mode
from rhtcomm.kernels import reference
from rhtcomm.kernels.task import Task
from rhtcomm.once import once
from rhtcomm.quantizers import Eden, Quantizer, QuicFL, VectorQuantizer
from rhtcomm.quantizers.base import tensor_of
from rhtcomm.randomness import Key, Stream, stratum
from rhtcomm.rotation import MOMENTS, Blocks, RandomizedHadamard

__all__ = ["MAX_BLOCK", "QUANTIZERS", "decode", "encode", "interpreted", "warps_for"]

QUANTIZERS = (QuicFL, Eden, VectorQuantizer)
MAX_BLOCK = 1 << 14  # what the registers of one program hold; larger blocks take the reference

_DITHER = tl.constexpr(int(Stream.DITHER))
_MOMENTS = tl.constexpr(MOMENTS)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return not isinstance(_encode, triton.JITFunction)


# Random streams ----------------------------------------------------------------------------------
#
# A key comes as (seed low, seed high, bucket, step) and purpose = stream + 16 hop + 256 rank, all
# words of 32 bits in int32, which is Triton's only integer argument whose type depends on no value.
# Places in the bucket come in sixteens of coordinates, which fit in 32 bits too.


@triton.jit
def _words(key, purpose, call, CALLS: tl.constexpr):
    """Calls call .. call + CALLS - 1 of a stream: (4 CALLS,) uint32."""
    low = key[0].to(tl.uint32, bitcast=True).to(tl.uint64)
    high = key[1].to(tl.uint32, bitcast=True).to(tl.uint64)
    calls = call + tl.arange(0, CALLS).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox((high << 32) | low, calls, key[2], key[3], purpose)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * CALLS])


@triton.jit
def _change_signs(x, key, purpose, sixteenth, SIZE: tl.constexpr):
    """x (SIZE,) times its random signs, by the sign bits, which is the same."""
    CALLS: tl.constexpr = max(1, SIZE // 128)
    words = _words(key, purpose, sixteenth // 8, CALLS)
    if SIZE < 128:  # the block owns a part of the words of one call
        part = (sixteenth % 8) // (SIZE // 16)
        here = tl.arange(0, 128 // SIZE)[:, None] == part.to(tl.int32)
        words = tl.max(tl.where(here, tl.reshape(words, [128 // SIZE, SIZE // 32]), 0), axis=0)
    minus = (words[:, None] << (31 - tl.arange(0, 32).to(tl.uint32)[None, :])) & 0x80000000
    flipped = x.to(tl.uint32, bitcast=True) ^ tl.reshape(minus, [SIZE])
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def _dither(key, hop, sixteenth, SIZE: tl.constexpr):
    """(SIZE,) uint32: v in the upper and u in the lower half, see `rhtcomm.randomness.dither`."""
    words = _words(key, hop + _DITHER, sixteenth, SIZE // 16)
    turn = 8 * tl.arange(0, 4).to(tl.uint32)[None, :]  # a turn by 32 bits is none
    turned = (words[:, None] >> ((turn + 8) % 32)) | (words[:, None] << (24 - turn))
    return tl.reshape(turned, [SIZE])


# Memory and precisions ---------------------------------------------------------------------------
#
# bfloat16 goes by its bits, which takes next to nothing, since Triton's interpreter does not round
# it to nearest even.


@triton.jit
def _load(at, mask, WHOLE: tl.constexpr):
    if WHOLE:  # a mask of unknown end would have the coordinates loaded one by one
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _store(at, x, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=mask)


@triton.jit
def _to_float32(x):
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _round_to(x, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif tl.float16 == DTYPE:
        bits = tl.where(x == x, x.to(tl.float16).to(tl.uint16, bitcast=True), 0x7E00)
        return bits.to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        return bits.to(tl.uint32).to(tl.float32, bitcast=True)


# Transforms and sums -----------------------------------------------------------------------------


@triton.jit
def _wrap(x):
    """Nothing, but for the interpreter, which adds up int32 in 64 bits."""
    return x.to(tl.int64).to(tl.int32)


@triton.jit
def _butterflies(x, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """(a, b) -> (a + b, a - b) at one stride, x (SIZE,) float32.

    A coordinate gets its partner as the sum of both, as integers, less itself: the compiler sees
    through that, so strides inside a thread cost nothing, others one shuffle, and data never
    change their layout. The sign is put on by multiplying with +-1, which is exact: fused or not,
    there is one rounding.
    """
    pairs = tl.reshape(x, [SIZE // (2 * STRIDE), 2, STRIDE])
    bits = pairs.to(tl.int32, bitcast=True)
    partner = _wrap(tl.sum(bits, axis=1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
    return tl.reshape(tl.fma(pairs, sign[None, :, None], partner), [SIZE])


@triton.jit
def _hadamard(x, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    for log in tl.static_range(LOG_SIZE):
        x = _butterflies(x, SIZE, 1 << log)
    return x


@triton.jit
def _rotate(x, key, purpose, sixteenth, SIZE: tl.constexpr, LOG: tl.constexpr, K: tl.constexpr):
    for stream in tl.static_range(K):
        x = _hadamard(_change_signs(x, key, purpose + stream, sixteenth, SIZE), SIZE, LOG)
    return x


@triton.jit
def _unrotate(y, key, purpose, sixteenth, SIZE: tl.constexpr, LOG: tl.constexpr, K: tl.constexpr):
    for undone in tl.static_range(K):
        y = _hadamard(y, SIZE, LOG)
        y = _change_signs(y, key, purpose + (K - 1 - undone), sixteenth, SIZE)
    return y


@triton.jit
def _tree_sum(x, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """The upper half is added to the lower until one is left; sums of two have but one order."""
    for log in tl.static_range(LOG_SIZE):
        x = tl.sum(tl.reshape(x, [2, SIZE >> (log + 1)]), axis=0)
    return tl.sum(x, axis=0)  # the one, as a scalar


@triton.jit
def _powers_of_two(peak):
    """2^(127 - e), 2^(e - 127) and whether all is finite, from the bits of what is largest."""
    exponent = tl.minimum(tl.maximum(peak >> 23, 1), 253)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    up = (exponent << 23).to(tl.float32, bitcast=True)
    return down, up, peak < 0x7F800000


@triton.jit
def _root_mean_square(y, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    return tl.sqrt_rn(_tree_sum(y * y, SIZE, LOG_SIZE) * (1.0 / SIZE))


# Packing -----------------------------------------------------------------------------------------
#
# The field of width w lies behind the wider ones, of BITS & -2 w bits in all, in code and in row.


@triton.jit
def _store_field(codes, to, COUNT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    if BITS & WIDTH:
        BEFORE: tl.constexpr = BITS & (-2 * WIDTH)
        LANES: tl.constexpr = 8 // WIDTH
        field = tl.reshape((codes >> BEFORE) & ((1 << WIDTH) - 1), [LANES, COUNT // LANES])
        octets = tl.sum(field << (WIDTH * tl.arange(0, LANES))[:, None], axis=0)
        octets = tl.reshape(octets, [COUNT // LANES // 4, 4])
        words = _wrap(tl.sum(octets << (8 * tl.arange(0, 4))[None, :], axis=1))
        tl.store(to + BEFORE * COUNT // 32 + tl.arange(0, COUNT // LANES // 4), words)


@triton.jit
def _store_codes(codes, to, COUNT: tl.constexpr, BITS: tl.constexpr):
    """codes (COUNT,) int32 -> COUNT BITS / 8 bytes, see `rhtcomm.bitpack`.

    Rows begin at multiples of 4 bytes and no more, so they are written, and read, by words.
    """
    to = to.to(tl.pointer_type(tl.int32))
    _store_field(codes, to, COUNT, BITS, 8)
    _store_field(codes, to, COUNT, BITS, 4)
    _store_field(codes, to, COUNT, BITS, 2)
    _store_field(codes, to, COUNT, BITS, 1)


@triton.jit
def _load_field(codes, row, COUNT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    if BITS & WIDTH:
        BEFORE: tl.constexpr = BITS & (-2 * WIDTH)
        LANES: tl.constexpr = 8 // WIDTH
        at = row + BEFORE * COUNT // 32 + tl.arange(0, COUNT // LANES // 4)
        octets = tl.load(at)[:, None] >> (8 * tl.arange(0, 4))[None, :]
        octets = tl.reshape(octets, [1, COUNT // LANES])
        field = (octets >> (WIDTH * tl.arange(0, LANES))[:, None]) & ((1 << WIDTH) - 1)
        codes |= tl.reshape(field, [COUNT]) << BEFORE
    return codes


@triton.jit
def _load_codes(row, COUNT: tl.constexpr, BITS: tl.constexpr):
    row = row.to(tl.pointer_type(tl.int32))
    codes = tl.zeros([COUNT], tl.int32)
    codes = _load_field(codes, row, COUNT, BITS, 8)
    codes = _load_field(codes, row, COUNT, BITS, 4)
    codes = _load_field(codes, row, COUNT, BITS, 2)
    return _load_field(codes, row, COUNT, BITS, 1)


# Quantizers --------------------------------------------------------------------------------------


@triton.jit
def _quic_fl_encode(
    y,
    row,
    positions,
    key,
    hop,
    sixteenth,
    offset,
    INVERSE_BOUND: tl.constexpr,
    NODES_PER_SIGMA: tl.constexpr,
    MIDDLE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
):
    # Magnitudes have the order of their bits, and their products that of the magnitudes.
    magnitudes = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    coded = tl.max(magnitudes, axis=0)
    if CAPACITY > 0:  # the largest but CAPACITY, from the top, equals counted one by one
        while tl.sum((magnitudes >= coded).to(tl.int32), axis=0) <= CAPACITY:
            coded = tl.max(tl.where(magnitudes < coded, magnitudes, 0), axis=0)
    coded = coded.to(tl.float32, bitcast=True) * INVERSE_BOUND
    scale = tl.maximum(_root_mean_square(y, SIZE, LOG_SIZE), coded)
    dither = _dither(key, hop, sixteenth, SIZE)
    u = (dither + offset) & 0xFFFF
    v = (dither + (offset << 16)) >> 16
    if CAPACITY > 0:
        exact = tl.abs(y) * INVERSE_BOUND > scale
        _store_exact(y, exact, u, scale, row + BITS * SIZE // 8, CAPACITY, SIZE)
        y = tl.where(exact, 0.0, y)
    unit = tl.where(scale > 0, tl.div_rn(1.0, scale) * NODES_PER_SIGMA, 0.0)
    node = ((y * unit).to(tl.int32) + (u.to(tl.int32) + MIDDLE)) >> 16
    codes = (tl.load(positions + node) + v.to(tl.int32)) >> 16
    _store_codes(codes, row, SIZE, BITS)
    return scale


@triton.jit
def _store_exact(y, exact, u, scale, section, CAPACITY: tl.constexpr, SIZE: tl.constexpr):
    """The coordinates that are sent exactly, at most CAPACITY, see `QuicFL.encode_exact`."""
    indices = section.to(tl.pointer_type(tl.int16))
    values = indices + CAPACITY
    places = tl.cumsum(exact.to(tl.int32), axis=0)
    z = tl.div_rn(y, tl.zeros_like(y) + scale).to(tl.uint32, bitcast=True)
    rounded = ((z + (u >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True).to(tl.float16)
    tl.store(indices + places - 1, tl.arange(0, SIZE).to(tl.int16), mask=exact)
    tl.store(values + places - 1, rounded.to(tl.int16, bitcast=True), mask=exact)
    entry = tl.arange(0, triton.next_power_of_2(CAPACITY))
    unused = (entry >= tl.max(places, axis=0)) & (entry < CAPACITY)
    tl.store(indices + entry, tl.full(entry.shape, -1, tl.int16), mask=unused)
    tl.store(values + entry, tl.zeros(entry.shape, tl.int16), mask=unused)


@triton.jit
def _put_exact(values, section, CAPACITY: tl.constexpr, SIZE: tl.constexpr):
    """values (SIZE,) with the exact coordinates in their places, see `QuicFL.decode_exact`."""
    indices = section.to(tl.pointer_type(tl.int16))
    place = tl.arange(0, SIZE)
    before = tl.full([], -1, tl.int32)
    for entry in range(CAPACITY):
        index = tl.load(indices + entry).to(tl.int32)
        exact = tl.load(indices + CAPACITY + entry).to(tl.float16, bitcast=True).to(tl.float32)
        values = tl.where((place == index) & (index > before), exact, values)
        before = tl.maximum(before, index)
    return values


@triton.jit
def _eden_nearest(z, boundaries, BITS: tl.constexpr):
    """The number of boundaries <= z, by bisection."""
    codes = tl.zeros_like(z).to(tl.int32)
    for digit in tl.static_range(BITS):
        middle = codes + (1 << (BITS - 1 - digit))
        codes = tl.where(z >= tl.load(boundaries + middle - 1), middle, codes)
    return codes


@triton.jit
def _coordinate(z, COUNT: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr):
    """Coordinate INDEX of each group, z (COUNT, GROUP) -> (COUNT,); adds nothing but zeros."""
    bits = tl.where(tl.arange(0, GROUP)[None, :] == INDEX, z.to(tl.int32, bitcast=True), 0)
    return _wrap(tl.sum(bits, axis=1)).to(tl.float32, bitcast=True)


@triton.jit
def _vector_nearest(z, codewords, half_norms, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """z (COUNT, GROUP) -> codes (COUNT,), see `VectorQuantizer`."""
    z0 = _coordinate(z, COUNT, GROUP, 0)
    z1 = _coordinate(z, COUNT, GROUP, 1)
    if GROUP > 2:
        z2 = _coordinate(z, COUNT, GROUP, 2)
        z3 = _coordinate(z, COUNT, GROUP, 3)
    if GROUP > 4:
        z4 = _coordinate(z, COUNT, GROUP, 4)
        z5 = _coordinate(z, COUNT, GROUP, 5)
        z6 = _coordinate(z, COUNT, GROUP, 6)
        z7 = _coordinate(z, COUNT, GROUP, 7)
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
def _values(codes, table, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """What codes (COUNT,) stand for, (COUNT GROUP,) float32, GROUP entries of the table a code."""
    index = codes[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.load(table + tl.reshape(index, [COUNT * GROUP]))


@triton.jit
def _eden_scale(rms, z, values, BIASED: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    agreement = _tree_sum(z * values, SIZE, LOG_SIZE)
    if BIASED:
        correction = tl.div_rn(agreement, _tree_sum(values * values, SIZE, LOG_SIZE))
    else:
        correction = tl.div_rn(_tree_sum(z * z, SIZE, LOG_SIZE), agreement)
    return tl.where(rms > 0, rms * correction, 0.0)


# Whole blocks ------------------------------------------------------------------------------------

_VOLATILE = [  # arguments that differ from call to call: no kernels of their own for 1 and 16 k
    *("numel", "first", "seed_low", "seed_high", "bucket", "step", "hop", "rank", "offset"),
    *("rows", "scale_stride", "code_stride", "world_size"),
]


def _jit(kernel):
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, do_not_specialize=[name for name in _VOLATILE if name in names])


@_jit
def _encode(
    x_at,
    scales_at,
    codes_at,
    moments_at,
    table,
    thresholds,
    numel,
    first,
    seed_low,
    seed_high,
    bucket,
    step,
    hop,
    rank,
    offset,
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
    block = tl.program_id(0).to(tl.int64)
    key = (seed_low, seed_high, bucket, step)
    sixteenth = first.to(tl.uint32, bitcast=True) + block.to(tl.uint32) * (SIZE // 16)
    place = block * SIZE + tl.arange(0, SIZE)
    x = _to_float32(_load(x_at + place, place < numel, WHOLE))
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    down, up, finite = _powers_of_two(peak)
    x = tl.where(finite, x * down, 0.0)
    if moments_at is not None:
        squares = x * x
        to = moments_at + block * _MOMENTS
        parts = tl.sum(tl.reshape(squares, [SIZE // 8, 8]), axis=0)
        tl.store(to + tl.arange(0, 8), parts)
        tl.store(to + 8, tl.sum(squares * tl.abs(x), axis=0))
        tl.store(to + 9, up)
    row = codes_at + block * (BITS * SIZE // 8 + 4 * CAPACITY)
    y = _rotate(x, key, hop + 256 * rank, sixteenth, SIZE, LOG_SIZE, ROTATIONS)
    if QUANTIZER == "QuicFL":
        scale = _quic_fl_encode(
            y,
            row,
            table,
            key,
            hop,
            sixteenth,
            offset.to(tl.uint32, bitcast=True),
            INVERSE_BOUND,
            NODES_PER_SIGMA,
            MIDDLE,
            CAPACITY,
            BITS,
            SIZE,
            LOG_SIZE,
        )
    else:
        rms = _root_mean_square(y, SIZE, LOG_SIZE)
        z = y * tl.where(rms > 0, tl.div_rn(1.0, rms), 0.0)
        COUNT: tl.constexpr = SIZE // GROUP
        if QUANTIZER == "Eden":
            codes = _eden_nearest(z, thresholds, BITS)
        else:
            codes = _vector_nearest(tl.reshape(z, [COUNT, GROUP]), table, thresholds, COUNT, GROUP)
        scale = _eden_scale(rms, z, _values(codes, table, COUNT, GROUP), BIASED, SIZE, LOG_SIZE)
        _store_codes(codes, row, COUNT, BITS * GROUP)
    scale = scale * normalization * up
    scale = tl.where(scale > _LARGEST, _LARGEST, scale)
    tl.store(scales_at + block, tl.where(finite, scale, float("nan")))


@_jit
def _decode(
    scales_at,
    codes_at,
    out_at,
    table,
    numel,
    first,
    seed_low,
    seed_high,
    bucket,
    step,
    hop,
    rank,
    rows,
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
    sixteenth = first.to(tl.uint32, bitcast=True) + block.to(tl.uint32) * (SIZE // 16)
    codes_at += block * (BITS * SIZE // 8 + 4 * CAPACITY)
    scales_at += block
    peak = tl.full([], 0, tl.int32)
    at = scales_at
    for _ in range(rows):
        peak = tl.maximum(peak, tl.load(at).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        at += scale_stride
    down, up, finite = _powers_of_two(peak)
    if QUANTIZER == "QuicFL":
        dither = _dither(key, hop, sixteenth, SIZE) >> 24  # all that receivers need
    # -0 is what changes no sum, not even -0.
    total = tl.full([SIZE], -(1 << 31), tl.int32).to(tl.float32, bitcast=True)
    for _ in range(rows):
        factor = tl.load(scales_at) * down
        codes = _load_codes(codes_at, SIZE // GROUP, BITS * GROUP)
        if QUANTIZER == "QuicFL":
            offset = (256 * rank).to(tl.uint32, bitcast=True) // world_size.to(tl.uint32)
            shared = ((dither + offset) & 0xFF) >> (8 - SHARED_BITS)
            values = tl.load(table + ((codes << SHARED_BITS) | shared.to(tl.int32)))
            if CAPACITY > 0:
                values = _put_exact(values, codes_at + BITS * SIZE // 8, CAPACITY, SIZE)
            total += values * factor
        else:
            values = _values(codes, table, SIZE // GROUP, GROUP) * factor
            purpose = hop + 256 * rank
            total += _unrotate(values, key, purpose, sixteenth, SIZE, LOG_SIZE, ROTATIONS)
        scales_at += scale_stride
        codes_at += code_stride
        rank += 1
    if QUANTIZER == "QuicFL":
        total = _unrotate(total, key, hop, sixteenth, SIZE, LOG_SIZE, ROTATIONS)
    mean = tl.where(finite, total * normalization * up, float("nan"))
    place = block * SIZE + tl.arange(0, SIZE)
    _store(out_at + place, _round_to(mean, out_at.dtype.element_ty), place < numel, WHOLE)


# Calls -------------------------------------------------------------------------------------------


@default_mode()  # of what the host computes
def encode(
    task: Task,
    x: torch.Tensor,
    payloads: torch.Tensor,
    moments: torch.Tensor | None = None,
) -> None:
    rotation, quantizer, key, section, _, rank, world_size = task
    if section.blocks.size > MAX_BLOCK:
        reference.encode(task, x, payloads, moments)
        return
    assert isinstance(quantizer, QUANTIZERS)
    table, thresholds = _tables(quantizer, x.device, encoding=True)
    levels = quantizer.table if isinstance(quantizer, QuicFL) else None
    blocks = task.blocks(len(payloads))
    scales, codes = section.views(payloads)
    x = section.coordinates(x, len(payloads))
    with torch.cuda.device_of(x):
        for i, run in enumerate(blocks.split(len(payloads))):
            coordinates = x[run.start - blocks.start : run.stop - blocks.start]
            _launch(
                _encode,
                run.count,
                _shape(rotation, quantizer, run, coordinates.numel()),
                coordinates,
                scales[i],
                codes[i],
                None if moments is None else moments[i * run.count :],
                table,
                thresholds,
                coordinates.numel(),
                *_words_of(key, run),
                rank if quantizer.rotation == "one_a_rank" else 0,
                256 * stratum(rank, world_size),
                run.size ** (-rotation.rotations / 2),
                BIASED=getattr(quantizer, "biased", False),
                INVERSE_BOUND=levels.inverse_bound if levels else 0.0,
                NODES_PER_SIGMA=levels.nodes_per_sigma if levels else 0.0,
                MIDDLE=levels.middle if levels else 0,
            )


@default_mode()
def decode(task: Task, payloads: torch.Tensor, out: torch.Tensor) -> None:
    rotation, quantizer, key, section, _, first_rank, world_size = task
    if section.blocks.size > MAX_BLOCK:
        reference.decode(task, payloads, out)
        return
    assert isinstance(quantizer, QUANTIZERS)
    ranks, parts, _ = payloads.shape
    (table,) = _tables(quantizer, out.device, encoding=False)
    blocks = task.blocks(parts)
    scales, codes = section.views(payloads)
    out = section.coordinates(out, parts)
    with torch.cuda.device_of(out):
        for i, run in enumerate(blocks.split(parts)):
            target = out[run.start - blocks.start : run.stop - blocks.start]
            _launch(
                _decode,
                run.count,
                _shape(rotation, quantizer, run, target.numel()),
                scales[:, i],
                codes[:, i],
                target,
                table,
                target.numel(),
                *_words_of(key, run),
                first_rank,
                ranks,
                scales.stride(0),
                codes.stride(0),
                world_size,
                run.size ** (-rotation.rotations / 2) / ranks,
                SHARED_BITS=quantizer.table.shared_bits if isinstance(quantizer, QuicFL) else 0,
            )


def _words_of(key: Key, blocks: Blocks) -> tuple[int, ...]:
    """first, seed, bucket, step and hop as the kernels take them: int32 of the same bits."""
    words = (
        blocks.start // 16,
        key.seed & 0xFFFFFFFF,
        key.seed >> 32,
        key.bucket,
        key.step,
        16 * key.hop,
    )
    return tuple(word - ((word & 1 << 31) << 1) for word in words)


def _shape(
    rotation: RandomizedHadamard, quantizer: Quantizer, blocks: Blocks, numel: int
) -> dict[str, object]:
    """What kernels are compiled for."""
    return {
        "QUANTIZER": type(quantizer).__name__,
        "BITS": quantizer.bits,
        "GROUP": quantizer.group,
        "CAPACITY": quantizer.exact_capacity(blocks.size) if isinstance(quantizer, QuicFL) else 0,
        "ROTATIONS": rotation.rotations,
        "SIZE": blocks.size,
        "LOG_SIZE": blocks.size.bit_length() - 1,
        "WHOLE": numel == blocks.count * blocks.size,
        "num_warps": warps_for(quantizer, blocks.size),
        "enable_fp_fusion": False,
    }


def warps_for(quantizer: Quantizer, size: int) -> int:
    """Warps of a program: 128 coordinates a thread, or 64 where those would not fit in registers.

    By the instructions that ptxas makes of the kernels, fewer threads with more registers are
    better, since strides inside a thread need no shuffle. That holds for blocks of 4096, which are
    not tuned at run time (`python benchmarks/gpu.py --warps` compares); for others it is where
    tuning begins.
    """
    light = isinstance(quantizer, QuicFL) and not quantizer.exact_fraction
    return max(1, size // (4096 if light else 2048))


_TUNED_FROM = 64  # programs: below, as for the one block of a tail, a launch takes no time
_fastest: dict[tuple[object, ...], int] = {}  # warps, by what was tuned
_tuning = Lock()
_one_at_a_time = Lock() if interpreted() else nullcontext()  # the interpreter knows no threads


def _launch(
    kernel: Any,
    programs: int,
    shape: dict[str, Any],
    first: torch.Tensor,
    *others: object,
    **constants: object,
) -> None:
    """Run a kernel on so many blocks, with as many warps as are fastest on its tensors' device.

    They change no bit of payloads and means, so the launches that are timed, once a process for
    each kernel and shape, do the work too. They stop the host and compile the kernel several times,
    which blocks of 4096, the default, are spared. One thread times at once; others do not wait for
    it, since it waits for a device whose work may depend on them.
    """

    def launch(warps: int) -> None:
        options = shape | constants | {"num_warps": warps}
        with _one_at_a_time:
            kernel[(programs,)](first, *others, **options)

    guess = shape["num_warps"]
    if shape["SIZE"] == 4096 or programs < _TUNED_FROM:
        launch(guess)
        return
    dtypes = tuple(x.dtype for x in (first, *others) if isinstance(x, torch.Tensor))
    what = (kernel, first.device, dtypes, *shape.items())
    if what not in _fastest and _can_time(first.device) and _tuning.acquire(blocking=False):
        try:
            if what not in _fastest:  # by now
                _fastest[what] = _tuned(launch, guess, shape["SIZE"])
        finally:
            _tuning.release()
    launch(_fastest.get(what, guess))


def _tuned(launch: Callable[[int], None], guess: int, size: int) -> int:
    """The fastest number of warps."""
    some = {max(1, guess // 2), guess, min(16, 2 * guess), min(16, 4 * guess)}
    candidates = sorted(w for w in some if size // (32 * w) <= 128)  # a thread has 255 registers
    seconds = {warps: _seconds(partial(launch, warps)) for warps in candidates}
    return min(candidates, key=seconds.__getitem__)


def _can_time(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _seconds(call: Callable[[], None]) -> float:
    """Of one of several calls on the current stream; infinity where the device has no room."""
    try:
        call()  # compiles
    except (OutOfResources, PTXASError):
        return math.inf
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # cycles, until all calls are queued: the host is the slower one
    start.record()
    for _ in range(5):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 5e3


@once
def _tables(
    quantizer: QuicFL | Eden | VectorQuantizer, device: torch.device, encoding: bool
) -> tuple[torch.Tensor, ...]:
    """On the device; they have arrived on return, so any stream may read them."""
    tables: tuple[npt.NDArray[Any], ...]
    if isinstance(quantizer, QuicFL):
        positions = quantizer.table.positions
        tables = (positions, positions) if encoding else (quantizer.table.levels,)
    elif isinstance(quantizer, Eden):
        tables = (quantizer.table.centroids, quantizer.table.boundaries)
    else:
        tables = (quantizer.table.codewords, quantizer.table.half_norms)
    tables = tables[: 1 + encoding]
    # No tensor that stays may be an inference tensor, and no copy may wait for what the current
    # stream waits for, while `once` holds its lock.
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.inference_mode(False), torch.cuda.stream(stream):
        return tuple(tensor_of(table, device) for table in tables)
