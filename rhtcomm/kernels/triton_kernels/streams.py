"""Random streams.

A key comes as (seed low, seed high, bucket, step) and purpose = stream + 16 hop + 256 rank, all
words of 32 bits in int32, which is Triton's only integer argument whose type depends on no value.
Offsets in the bucket count sixteens of coordinates, so that they fit in 32 bits too.
"""

import triton
import triton.language as tl

from rhtcomm.randomness import Stream

_DITHER = tl.constexpr(int(Stream.DITHER))


@triton.jit
def draw_words(key, purpose, call, CALLS: tl.constexpr):
    """Calls call .. call + CALLS - 1 of a stream: (4 CALLS,) uint32."""
    low = key[0].to(tl.uint32, bitcast=True).to(tl.uint64)
    high = key[1].to(tl.uint32, bitcast=True).to(tl.uint64)
    calls = call + tl.arange(0, CALLS).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox((high << 32) | low, calls, key[2], key[3], purpose)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * CALLS])


@triton.jit
def change_signs(x, key, purpose, sixteenth, SIZE: tl.constexpr):
    """x (SIZE,) times its random signs, which flip sign bits."""
    CALLS: tl.constexpr = max(1, SIZE // 128)
    words = draw_words(key, purpose, sixteenth // 8, CALLS)
    if SIZE < 128:  # the block owns some of the words of one call
        block = (sixteenth % 8) // (SIZE // 16)
        own = tl.arange(0, 128 // SIZE)[:, None] == block.to(tl.int32)
        words = tl.max(tl.where(own, tl.reshape(words, [128 // SIZE, SIZE // 32]), 0), axis=0)
    minus = (words[:, None] << (31 - tl.arange(0, 32).to(tl.uint32)[None, :])) & 0x80000000
    flipped = x.to(tl.uint32, bitcast=True) ^ tl.reshape(minus, [SIZE])
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def draw_dither(key, hop, sixteenth, SIZE: tl.constexpr):
    """(SIZE,) uint32: v in the upper and u in the lower half, see `rhtcomm.randomness.dither`."""
    words = draw_words(key, hop + _DITHER, sixteenth, SIZE // 16)
    turn = 8 * tl.arange(0, 4).to(tl.uint32)[None, :]  # a turn by 32 bits is none
    turned = (words[:, None] >> ((turn + 8) % 32)) | (words[:, None] << (24 - turn))
    return tl.reshape(turned, [SIZE])


@triton.jit
def shift_dither(words, shift):
    """u and v of dither words, each (SIZE,) uint32, both shifted by `shift` / 2^16 modulo one."""
    shift = shift.to(tl.uint32, bitcast=True)
    return (words + shift) & 0xFFFF, (words + (shift << 16)) >> 16
