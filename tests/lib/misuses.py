"""Kernels for which it would matter what Triton's interpreter does otherwise."""

import torch
import triton
import triton.language as tl

__all__ = ["fma", "umulhi"]


@triton.jit
def multiply_and_add(x, FACTOR: tl.constexpr):
    tl.store(x, tl.fma(tl.load(x), FACTOR, 1.0))


@triton.jit
def high_half(x, TYPE: tl.constexpr):
    n = tl.load(x).to(TYPE)
    tl.store(x, tl.umulhi(n, n).to(tl.float32))


def fma(factor: float) -> float:
    x = torch.full((1,), 3.0)
    multiply_and_add[(1,)](x, factor)
    return x.item()


def umulhi(signed: bool) -> float:
    x = torch.full((1,), 2.0**20)
    high_half[(1,)](x, tl.int32 if signed else tl.uint32)
    return x.item()
