"""Memory and precisions.

Triton's interpreter does not round to the nearest bfloat16, so there rounding works on the bits.
"""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.order import to_memory, to_threads

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load(pointers, mask, WHOLE: tl.constexpr):
    if WHOLE:  # a mask of unknown end would have the coordinates loaded one by one
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store(pointers, x, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=mask)


@triton.jit
def look_up(
    table,
    index,
    ENTRIES: tl.constexpr,
    SIZE: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """table[index], index (SIZE,) in thread order and below ENTRIES.

    The table is padded to the next power of two. If that is at most half the block, it is copied to
    shared memory, where random reads of 32 threads conflict less.
    """
    LENGTH: tl.constexpr = triton.next_power_of_2(ENTRIES)
    if 2 * LENGTH <= SIZE and THREADS > 32:  # within one warp Triton gathers by shuffles
        return tl.gather(tl.load(table + tl.arange(0, LENGTH)), index, 0)
    else:
        return to_threads(
            tl.load(table + to_memory(index, SIZE, NEAR, THREADS)), SIZE, NEAR, THREADS
        )


@triton.jit
def to_float32(x):
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr, NAN: tl.constexpr):
    """x (n,) float32 to the nearest of DTYPE; NAN says whether x may hold NaN, which become one."""
    if tl.bfloat16 == DTYPE and _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        rounded = bits.to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(DTYPE)
    if NAN:
        rounded = tl.where(x == x, rounded, nan_of(DTYPE))
    return rounded


@triton.jit
def nan_of(DTYPE: tl.constexpr):
    """The canonical NaN of all kernels."""
    if tl.bfloat16 == DTYPE:
        return tl.full([], 0x7FC0, tl.uint16).to(tl.bfloat16, bitcast=True)
    elif tl.float16 == DTYPE:
        return tl.full([], 0x7E00, tl.uint16).to(tl.float16, bitcast=True)
    else:
        return tl.full([], 0x7FC00000, tl.uint32).to(tl.float32, bitcast=True)
