"""Random streams.

A key is passed as (seed low, seed high, bucket, step) and purpose = stream + 16 hop + 256 rank, all
32-bit words in int32, Triton's only integer argument whose type does not depend on the value.
Offsets in the bucket are in units of 16 coordinates, so that they fit in 32 bits too.
"""

import triton
import triton.language as tl

from rhtcomm.kernels.triton_kernels.order import to_threads
from rhtcomm.randomness import Stream

_DITHER = tl.constexpr(int(Stream.DITHER))


@triton.jit
def sixteenth_of(offset, block, SIZE: tl.constexpr):
    """The offset of a block in the bucket, in units of 16 coordinates; `offset` is block 0's."""
    return offset.to(tl.uint32, bitcast=True) + block.to(tl.uint32) * (SIZE // 16)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of counters and a key, all uint32: four words, see `rhtcomm.randomness`.

    `tl.philox` uses two multiplications for the halves of each product; here one gives both.
    """
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def draw_words(key, purposes, calls, CALLS: tl.constexpr):
    """Some calls of streams, `purposes` and `calls` (CALLS,) uint32: (4 CALLS,) uint32."""
    bucket = tl.full([CALLS], 0, tl.uint32) + key[2].to(tl.uint32, bitcast=True)
    step = tl.full([CALLS], 0, tl.uint32) + key[3].to(tl.uint32, bitcast=True)
    low, high = key[0].to(tl.uint32, bitcast=True), key[1].to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox(calls, bucket, step, purposes, low, high)
    lower = tl.permute(
        tl.join(w0, w1), (1, 0)
    )  # calls stay the last axis: threads keep what they drew
    upper = tl.permute(tl.join(w2, w3), (1, 0))
    words = tl.permute(tl.join(lower, upper), (1, 2, 0))
    return tl.reshape(words, [4 * CALLS])


@triton.jit
def draw_signs(key, purpose, sixteenth, ROTATIONS: tl.constexpr, SIZE: tl.constexpr):
    """A tuple of ROTATIONS tensors of words (SIZE / 32,) uint32, with one sign per bit.

    All are drawn at once, since one stream alone has fewer calls than there are threads.
    """
    STREAMS: tl.constexpr = triton.next_power_of_2(ROTATIONS)
    CALLS: tl.constexpr = max(1, SIZE // 128)
    index = tl.arange(0, STREAMS * CALLS).to(tl.uint32)
    purposes = purpose.to(tl.uint32, bitcast=True) + index // CALLS
    words = draw_words(key, purposes, sixteenth // 8 + index % CALLS, STREAMS * CALLS)
    if SIZE < 128:  # the block owns some of the words of one call
        block = (sixteenth % 8) // (SIZE // 16)
        own = tl.arange(0, 128 // SIZE)[None, :, None] == block.to(tl.int32)
        words = tl.reshape(words, [STREAMS, 128 // SIZE, SIZE // 32])
        words = tl.max(tl.where(own, words, 0), axis=1)
    words = tl.permute(tl.reshape(words, [STREAMS, SIZE // 32]), (1, 0))
    if ROTATIONS == 1:
        return (tl.reshape(words, [SIZE // 32]),)
    elif ROTATIONS == 2:
        return tl.split(words)
    else:
        even, odd = tl.split(tl.reshape(words, [SIZE // 32, 2, 2]))
        first, third = tl.split(even)
        second, _ = tl.split(odd)
        return first, second, third


@triton.jit
def change_signs(x, words, SIZE: tl.constexpr, NEAR: tl.constexpr, THREADS: tl.constexpr):
    """x (SIZE,), in thread order, its signs flipped where `words` (SIZE / 32,) have a bit."""
    NEIGHBOURS: tl.constexpr = 32 // NEAR  # threads that share a word
    words = tl.reshape(words, [SIZE // (THREADS * NEAR), 1, THREADS // NEIGHBOURS, 1])
    bit = tl.arange(0, NEAR)[:, None] + NEAR * tl.arange(0, NEIGHBOURS)[None, :]
    shift = tl.reshape(31 - bit, [1, NEAR, 1, NEIGHBOURS]).to(tl.uint32)
    minus = tl.reshape((words << shift) & 0x80000000, [SIZE])
    return (x.to(tl.uint32, bitcast=True) ^ minus).to(tl.float32, bitcast=True)


@triton.jit
def draw_dither(
    key,
    hop,
    sixteenth,
    stratum,
    SIZE: tl.constexpr,
    NEAR: tl.constexpr,
    THREADS: tl.constexpr,
):
    """(SIZE,) uint32: v in the upper and u in the lower half, see `rhtcomm.randomness.dither`.

    In thread order. `stratum`, 0 .. 255 in units of 1/256, is added to both modulo one, which
    changes only their upper bytes. In a word of four coordinates these are two bytes of the drawn
    word: the even ones for coordinates 0 and 2, the odd ones for 1 and 3. So it is added to all
    four bytes at once, and each coordinate uses two of them.
    """
    calls = sixteenth + tl.arange(0, SIZE // 16).to(tl.uint32)
    purposes = tl.full([SIZE // 16], 0, tl.uint32) + (hop + _DITHER).to(tl.uint32, bitcast=True)
    words = draw_words(key, purposes, calls, SIZE // 16)
    words = to_threads(words, SIZE // 4, NEAR // 4, THREADS)
    moved = add_to_bytes(words, stratum.to(tl.uint32, bitcast=True) * 0x01010101)
    even = (moved & 0x00FF00FF) | (words & 0xFF00FF00)
    odd = (moved & 0xFF00FF00) | (words & 0x00FF00FF)
    words = tl.permute(
        tl.reshape(tl.join(even, odd), [SIZE // (4 * THREADS), THREADS, 2]), (0, 2, 1)
    )
    words = words[:, None, :, :]  # (words of a thread, 2, even or odd, threads)
    turn = 8 * tl.reshape(tl.arange(0, 4), [1, 2, 2, 1]).to(tl.uint32)  # by 32 bits is none
    return tl.reshape((words >> ((turn + 8) % 32)) | (words << (24 - turn)), [SIZE])


@triton.jit
def add_to_bytes(words, addends):
    """Adds the bytes of two words one by one, without carries between them."""
    lower = (words & 0x7F7F7F7F) + (addends & 0x7F7F7F7F)
    return lower ^ ((words ^ addends) & 0x80808080)
