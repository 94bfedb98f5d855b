"""Transforms and sums."""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.streams import change_signs


@triton.jit
def wrap(x):
    """x modulo 2^32: the interpreter adds up int32 in 64 bits, elsewhere nothing changes."""
    return x.to(tl.int64).to(tl.int32)


@triton.jit
def butterflies(x, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """(a, b) -> (a + b, a - b) at one stride, x (SIZE,) float32.

    A coordinate gets its partner as the sum of both, as integers, less itself: the compiler sees
    through that, so strides inside a thread cost nothing, others one shuffle, and data never
    change their layout. The sign is put on by multiplying with +-1, which is exact: fused or not,
    there is one rounding.
    """
    pairs = tl.reshape(x, [SIZE // (2 * STRIDE), 2, STRIDE])
    bits = pairs.to(tl.int32, bitcast=True)
    partner = wrap(tl.sum(bits, axis=1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
    return tl.reshape(tl.fma(pairs, sign[None, :, None], partner), [SIZE])


@triton.jit
def hadamard(x, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    for log in tl.static_range(LOG_SIZE):
        x = butterflies(x, SIZE, 1 << log)
    return x


@triton.jit
def rotate(x, key, purpose, sixteenth, SIZE: tl.constexpr, LOG: tl.constexpr, K: tl.constexpr):
    for stream in tl.static_range(K):
        x = hadamard(change_signs(x, key, purpose + stream, sixteenth, SIZE), SIZE, LOG)
    return x


@triton.jit
def unrotate(y, key, purpose, sixteenth, SIZE: tl.constexpr, LOG: tl.constexpr, K: tl.constexpr):
    for undone in tl.static_range(K):
        y = hadamard(y, SIZE, LOG)
        y = change_signs(y, key, purpose + (K - 1 - undone), sixteenth, SIZE)
    return y


@triton.jit
def tree_sum(x, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """The upper half is added to the lower until one is left; sums of two have but one order."""
    for log in tl.static_range(LOG_SIZE):
        x = tl.sum(tl.reshape(x, [2, SIZE >> (log + 1)]), axis=0)
    return tl.sum(x, axis=0)  # the one, as a scalar


@triton.jit
def powers_of_two(peak):
    """2^(127 - e), 2^(e - 127) and whether all is finite, from the bits of what is largest."""
    exponent = tl.minimum(tl.maximum(peak >> 23, 1), 253)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    up = (exponent << 23).to(tl.float32, bitcast=True)
    return down, up, peak < 0x7F800000


@triton.jit
def root_mean_square(y, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    return tl.sqrt_rn(tree_sum(y * y, SIZE, LOG_SIZE) * (1.0 / SIZE))
