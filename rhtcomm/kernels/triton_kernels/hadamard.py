"""Hadamard transforms and sums; see `order` for the orders of coordinates."""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.order import to_memory, to_threads
from rhtcomm.kernels.triton_kernels.streams import change_signs


@triton.jit
def wrap(x):
    """x modulo 2^32: the interpreter sums int32 in 64 bits; on a GPU nothing changes."""
    return x.to(tl.int64).to(tl.int32)


@triton.jit
def butterflies(x, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """(a, b) -> (a + b, a - b) at one stride, x (SIZE,) float32.

    The partner of a coordinate is the integer sum of both minus the coordinate. The compiler
    simplifies this: strides inside a thread cost nothing, others one shuffle, and the layout does
    not change. Multiplying by +-1 is exact, so there is one rounding, fused or not.
    """
    pairs = tl.reshape(x, [SIZE // (2 * STRIDE), 2, STRIDE])
    bits = pairs.to(tl.int32, bitcast=True)
    partner = wrap(tl.sum(bits, axis=1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
    return tl.reshape(tl.fma(pairs, sign[None, :, None], partner), [SIZE])


@triton.jit
def transform_rows(x, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """The transforms of the rows of x (ROWS, LENGTH), as (LENGTH, ROWS).

    Splitting requires that each thread holds whole rows. If it does not yet, rows are moved once
    through shared memory, and later back: 4 accesses of 16 bytes for 4 coordinates. Shuffles would
    take one access per coordinate and stride.
    """
    if LENGTH == 1:
        return tl.reshape(x, [1, ROWS])
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, LENGTH // 2, 2]))
        sums = transform_rows(even + odd, ROWS, LENGTH // 2)
        differences = transform_rows(even - odd, ROWS, LENGTH // 2)
        return tl.reshape(tl.permute(tl.join(sums, differences), (0, 2, 1)), [LENGTH, ROWS])


@triton.jit
def hadamard(x, SIZE: tl.constexpr, LOG: tl.constexpr, NEAR: tl.constexpr, THREADS: tl.constexpr):
    """The transform of x (SIZE,), in thread order."""
    FAR: tl.constexpr = SIZE // (THREADS * NEAR)
    if THREADS * THREADS <= SIZE:  # rows of THREADS coordinates fit in one thread
        x = tl.permute(tl.reshape(x, [FAR, NEAR, THREADS]), (0, 2, 1))
        x = transform_rows(tl.reshape(x, [FAR * THREADS, NEAR]), FAR * THREADS, NEAR)
        x = transform_rows(tl.reshape(x, [NEAR * FAR, THREADS]), NEAR * FAR, THREADS)
        x = tl.permute(tl.reshape(x, [THREADS, NEAR, FAR]), (1, 0, 2))
        x = transform_rows(tl.reshape(x, [NEAR * THREADS, FAR]), NEAR * THREADS, FAR)
        return tl.reshape(x, [SIZE])
    else:
        x = to_memory(x, SIZE, NEAR, THREADS)
        for log in tl.static_range(LOG):
            x = butterflies(x, SIZE, 1 << log)
        return to_threads(x, SIZE, NEAR, THREADS)


@triton.jit
def rotate(
    x,
    signs,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """x (SIZE,) and the result in thread order; see `draw_signs`."""
    for stream in tl.static_range(ROTATIONS):
        x = change_signs(x, signs[stream], SIZE, NEAR, THREADS)
        x = hadamard(x, SIZE, LOG, NEAR, THREADS)
    return x


@triton.jit
def unrotate(
    y,
    signs,
    ROTATIONS: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """y (SIZE,) and the result in thread order; see `draw_signs`."""
    for undone in tl.static_range(ROTATIONS):
        y = hadamard(y, SIZE, LOG, NEAR, THREADS)
        y = change_signs(y, signs[ROTATIONS - 1 - undone], SIZE, NEAR, THREADS)
    return y


@triton.jit
def tree_sum(x, SIZE: tl.constexpr, LOG: tl.constexpr, NEAR: tl.constexpr, THREADS: tl.constexpr):
    """Sum of x (SIZE,) in thread order: the upper half of memory is added to the lower until one
    value is left.

    A sum of two has only one order.
    """
    for log in tl.static_range(LOG):
        if SIZE >> log == NEAR * THREADS:  # until here both orders have the same halves
            x = to_memory(x, NEAR * THREADS, NEAR, THREADS)
        x = tl.sum(tl.reshape(x, [2, SIZE >> (log + 1)]), axis=0)
    return tl.sum(x, axis=0)  # the one, as a scalar


@triton.jit
def largest_magnitude(x):
    """The largest magnitude of x (SIZE,) float32, as its bits: they have the same order.

    Of the positive numbers the largest has the largest bits, of the negative ones too, where bits
    count as unsigned.
    """
    positive = tl.max(x.to(tl.int32, bitcast=True), axis=0)
    negative = tl.max(x.to(tl.uint32, bitcast=True), axis=0) & 0x7FFFFFFF
    return tl.maximum(positive, negative.to(tl.int32, bitcast=True))


@triton.jit
def powers_of_two(peak):
    """2^(127 - e), 2^(e - 127) and whether all values are finite, from the bits of the largest
    magnitude."""
    exponent = tl.minimum(tl.maximum(peak >> 23, 1), 253)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    up = (exponent << 23).to(tl.float32, bitcast=True)
    return down, up, peak < 0x7F800000


@triton.jit
def root_mean_square(
    y, SIZE: tl.constexpr, LOG: tl.constexpr, NEAR: tl.constexpr, THREADS: tl.constexpr
):
    """Of y (SIZE,) in thread order."""
    return tl.sqrt_rn(tree_sum(y * y, SIZE, LOG, NEAR, THREADS) * (1.0 / SIZE))
