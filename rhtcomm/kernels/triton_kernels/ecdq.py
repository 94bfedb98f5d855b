"""ECDQ: blocks to columns of its table and back, one program per block, and units of columns to
bytes and back, one warp per unit, whose threads are the lanes of the coder (see `rhtcomm.rans`)."""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.blocks import (
    jit,
    largest_scale,
    load_block,
    store_mean,
    store_scale,
)
from rhtcomm.kernels.triton_kernels.hadamard import (
    largest_magnitude,
    powers_of_two,
    root_mean_square,
    rotate,
    unrotate,
)
from rhtcomm.kernels.triton_kernels.order import to_memory, to_threads
from rhtcomm.kernels.triton_kernels.streams import draw_dither, draw_signs, sixteenth_of
from rhtcomm.rans import LANES

__all__ = [
    "decode_unit",
    "dither_block",
    "encode_unit",
    "finish_unit",
    "mean_block",
    "quantize_block",
]

_LANES = tl.constexpr(LANES)
_LEAST = tl.constexpr(1 << 16)  # state
_CHUNK = tl.constexpr(256)  # words that are copied at once


@jit
def quantize_block(
    x,
    scales,
    columns,
    words,
    moments,
    numel,
    offset,
    seed_low,
    seed_high,
    bucket,
    step,
    hop,
    stratum,
    factor,
    normalization,
    INVERSE_BOUND: tl.constexpr,
    PER_STEP: tl.constexpr,
    QUARTER_STEP: tl.constexpr,
    LARGEST: tl.constexpr,
    CLASS_BITS: tl.constexpr,
    UNIT: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Computes the columns of a block with its scale times `factor`, unless its unit is already
    encoded.

    Args:
        columns: (blocks SIZE,) uint8, of the table of frequencies.
        words: (units,) int32, negative for units of UNIT blocks that are not encoded yet.
    """
    NEAR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # 16 bytes
    THREADS: tl.constexpr = min(32 * WARPS, SIZE // NEAR)
    block = tl.program_id(0).to(tl.int64)
    if tl.load(words + block // UNIT) < 0:
        key = (seed_low, seed_high, bucket, step)
        sixteenth = sixteenth_of(offset, block, SIZE)
        y, up, finite = load_block(x, block, numel, moments, SIZE, WHOLE)
        y = to_threads(y, SIZE, NEAR, THREADS)
        signs = draw_signs(key, hop, sixteenth, ROTATIONS, SIZE)
        y = rotate(y, signs, ROTATIONS, SIZE, LOG_SIZE, NEAR, THREADS)
        rms = root_mean_square(y, SIZE, LOG_SIZE, NEAR, THREADS)
        fitting = largest_magnitude(y).to(tl.float32, bitcast=True) * INVERSE_BOUND
        scale = tl.maximum(rms, fitting) * factor
        grid = tl.where(scale > 0, tl.div_rn(1.0, scale) * PER_STEP, 0.0)
        v = (draw_dither(key, hop, sixteenth, stratum, SIZE, NEAR, THREADS) >> 16).to(tl.int32)
        k = ((y * grid).to(tl.int32) + v) >> 16
        column = (v >> (16 - CLASS_BITS)) * (2 * LARGEST + 1) + (k + LARGEST)
        column = to_memory(column, SIZE, NEAR, THREADS).to(tl.uint8)
        tl.store(columns + block * SIZE + tl.arange(0, SIZE), column)
        store_scale(scales + block, scale * QUARTER_STEP, normalization, up, finite)


@jit
def encode_unit(
    columns,
    entries,
    packed,
    buffer,
    words,
    unit_bytes,
    steps,
    room,
    PRECISION: tl.constexpr,
):
    """Encodes a unit unless it is already encoded; see `rhtcomm.rans` and, for entries,
    `ecdq.Table`.

    Stores the lanes' states in the payload, the words at the end of the unit's part of `buffer`
    (units, room) uint16, and the number of words, or -1 if they do not fit.
    """
    unit = tl.program_id(0).to(tl.int64)
    if tl.load(words + unit) < 0:
        lane = tl.arange(0, _LANES)
        columns += unit * (steps * _LANES)
        buffer += unit * room
        x = tl.full([_LANES], _LEAST, tl.uint32)
        end = room  # of what is left of the buffer, which is filled from its end
        for done in range(steps):
            column = tl.load(columns + (steps - 1 - done) * _LANES + lane).to(tl.int32)
            entry = tl.load(entries + 2 * column).to(tl.uint32, bitcast=True)
            inverse = tl.load(entries + 2 * column + 1).to(tl.uint32, bitcast=True)
            frequency = entry & 0x1FFF
            emits = (x >= frequency << (32 - PRECISION)).to(tl.int32)
            end -= tl.sum(emits, axis=0)
            place = end + tl.cumsum(emits, axis=0) - 1
            word = (x & 0xFFFF).to(tl.uint16)
            tl.store(buffer + place, word, mask=(emits != 0) & (place >= 0))
            x = tl.where(emits != 0, x >> 16, x)
            shift = (31 + (entry >> 26)).to(tl.uint64)
            quotient = ((x.to(tl.uint64) * inverse.to(tl.uint64)) >> shift).to(tl.uint32)
            rest = x - quotient * frequency
            x = (quotient << PRECISION) + rest + ((entry >> 13) & 0x1FFF)
        states = (packed + unit * unit_bytes).to(tl.pointer_type(tl.int32))
        tl.store(states + lane, x.to(tl.int32, bitcast=True))
        tl.store(words + unit, tl.where(end >= 0, room - end, -1))


@jit
def finish_unit(packed, buffer, words, unit_bytes, room):
    """Moves the words of a unit after the states; a unit without words becomes zeros."""
    unit = tl.program_id(0).to(tl.int64)
    count = tl.load(words + unit)
    lane = tl.arange(0, _LANES)
    states = (packed + unit * unit_bytes).to(tl.pointer_type(tl.int32)) + lane
    tl.store(states, tl.zeros([_LANES], tl.int32), mask=(lane >= 0) & (count < 0))
    to = (packed + unit * unit_bytes + 4 * _LANES).to(tl.pointer_type(tl.uint16))
    buffer += unit * room + (room - count)
    for begin in range(0, room, _CHUNK):
        index = begin + tl.arange(0, _CHUNK)
        word = tl.load(buffer + index, mask=index < count, other=0)
        tl.store(to + index, word, mask=index < room)


@jit
def dither_block(
    dithers,
    offset,
    seed_low,
    seed_high,
    bucket,
    step,
    hop,
    SIZE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The upper bytes of the dither of a block, without a stratum."""
    NEAR: tl.constexpr = 4
    THREADS: tl.constexpr = min(32 * WARPS, SIZE // NEAR)
    block = tl.program_id(0).to(tl.int64)
    key = (seed_low, seed_high, bucket, step)
    sixteenth = sixteenth_of(offset, block, SIZE)
    words = draw_dither(key, hop, sixteenth, tl.full([], 0, tl.int32), SIZE, NEAR, THREADS)
    upper = to_memory(words >> 24, SIZE, NEAR, THREADS).to(tl.uint8)
    tl.store(dithers + block * SIZE + tl.arange(0, SIZE), upper)


@triton.jit
def dither_of(dither, rank, world_size):
    """The upper byte of the v of a rank, int32."""
    stratum = (256 * rank).to(tl.uint32, bitcast=True) // world_size.to(tl.uint32)
    return ((dither + stratum) & 0xFF).to(tl.int32)


@jit
def decode_unit(
    packed,
    slots,
    dithers,
    columns,
    rank,
    world_size,
    code_stride,
    column_stride,
    unit_bytes,
    steps,
    room,
    PRECISION: tl.constexpr,
    CLASS_BITS: tl.constexpr,
):
    """The columns of the symbols of a unit of a rank: program (unit, rank)."""
    unit = tl.program_id(0).to(tl.int64)
    other = tl.program_id(1)
    lane = tl.arange(0, _LANES)
    packed += other.to(tl.int64) * code_stride + unit * unit_bytes
    columns += other.to(tl.int64) * column_stride + unit * (steps * _LANES)
    dithers += unit * (steps * _LANES)
    words = (packed + 4 * _LANES).to(tl.pointer_type(tl.uint16))
    x = tl.load(packed.to(tl.pointer_type(tl.int32)) + lane).to(tl.uint32, bitcast=True)
    read = tl.full([], 0, tl.int32)
    for step in range(steps):
        index = step * _LANES + lane
        dither = dither_of(tl.load(dithers + index).to(tl.uint32), rank + other, world_size)
        base = (dither >> (8 - CLASS_BITS)) << PRECISION
        slot = base + (x & ((1 << PRECISION) - 1)).to(tl.int32)
        entry = tl.load(slots + slot).to(tl.uint32, bitcast=True)
        tl.store(columns + index, (entry >> 24).to(tl.uint8))
        x = ((entry >> 12) & 0xFFF) * (x >> PRECISION) + (entry & 0xFFF)
        needs = (x < _LEAST).to(tl.int32)
        place = read + tl.cumsum(needs, axis=0) - 1
        word = tl.load(words + place, mask=(needs != 0) & (place < room), other=0)
        x = tl.where(needs != 0, (x << 16) | word.to(tl.uint32), x)
        read += tl.sum(needs, axis=0)


@jit
def mean_block(
    scales,
    columns,
    dithers,
    out,
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
    column_stride,
    world_size,
    normalization,
    LARGEST: tl.constexpr,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The mean of a block over ranks, from the columns of its symbols."""
    NEAR: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # 16 bytes
    THREADS: tl.constexpr = min(32 * WARPS, SIZE // NEAR)
    block = tl.program_id(0).to(tl.int64)
    key = (seed_low, seed_high, bucket, step)
    sixteenth = sixteenth_of(offset, block, SIZE)
    scales += block
    down, up, finite = powers_of_two(largest_scale(scales, ranks, scale_stride))
    index = block * SIZE + tl.arange(0, SIZE)
    dither = tl.load(dithers + index).to(tl.uint32)
    columns += index
    # Adding to -0 does not change any value, not even -0.
    total = tl.full([SIZE], -(1 << 31), tl.int32).to(tl.float32, bitcast=True)
    for _ in range(ranks):
        column = tl.load(columns).to(tl.int32)
        grid = 512 * (column - LARGEST) - 2 * dither_of(dither, rank, world_size) + 255
        total += (grid.to(tl.float32) * 0.0078125) * (tl.load(scales) * down)
        scales += scale_stride
        columns += column_stride
        rank += 1
    total = to_threads(total, SIZE, NEAR, THREADS)
    signs = draw_signs(key, hop, sixteenth, ROTATIONS, SIZE)
    total = unrotate(total, signs, ROTATIONS, SIZE, LOG_SIZE, NEAR, THREADS)
    # fmt: off
    store_mean(
        total, out, block, numel, normalization, up, finite, False, SIZE, NEAR, THREADS, WHOLE
    )
    # fmt: on
