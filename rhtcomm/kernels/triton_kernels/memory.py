"""Memory and precisions.

bfloat16 is converted by its bits, which takes next to no time, since Triton's interpreter does not
round it to nearest even.
"""

import triton
import triton.language as tl


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
def to_float32(x):
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
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
