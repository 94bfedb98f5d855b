"""Which thread holds which coordinates.

In memory, a block of SIZE coordinates has the shape (FAR, THREADS, NEAR): a thread loads NEAR
neighbours at once (16 bytes), the next thread the next NEAR, and so on, FAR times. Triton assigns
the elements of a tensor to threads one by one. So a tensor in *thread order*, (FAR, NEAR, THREADS),
stays where the loads put it. Changing the order moves no data: the compiler only renames registers.
"""

import triton
import triton.language as tl


@triton.jit
def to_threads(x, SIZE: tl.constexpr, NEAR: tl.constexpr, THREADS: tl.constexpr):
    """x (SIZE,) from memory order to thread order."""
    x = tl.reshape(x, [SIZE // (THREADS * NEAR), THREADS, NEAR])
    return tl.reshape(tl.permute(x, (0, 2, 1)), [SIZE])


@triton.jit
def to_memory(x, SIZE: tl.constexpr, NEAR: tl.constexpr, THREADS: tl.constexpr):
    """x (SIZE,) from thread order to memory order."""
    x = tl.reshape(x, [SIZE // (THREADS * NEAR), NEAR, THREADS])
    return tl.reshape(tl.permute(x, (0, 2, 1)), [SIZE])
