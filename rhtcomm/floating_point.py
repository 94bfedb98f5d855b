"""The floating-point mode that results must not depend on.

A thread has a mode: the direction in which it rounds, and whether it flushes subnormal numbers to
zero. It inherits the mode from the thread that starts it. `torch.set_flush_denormal` and C's
`fesetround` change it, and so does loading a library that was linked with -ffast-math. Replicas
have the same bits only if all ranks compute payloads and results in the same mode: round to
nearest, keep subnormals. The C kernels set this mode on each of their threads; what torch, NumPy or
MPI computes on the CPU runs within `default_mode`. GPUs are not affected.

NaNs also differ: by processor, by dtype, even by position in a tensor. `assign_` always writes the
same NaN.
"""

from collections.abc import Callable
from contextlib import ContextDecorator
from functools import cache

import torch

__all__ = ["GRAIN", "assign_", "default_mode"]

_NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
_INTEGER = {4: torch.int32, 2: torch.int16}
# The least number of elements that torch gives to a thread: smaller tensors stay on the calling
# thread.
GRAIN = 1 << 15


class default_mode(ContextDecorator):
    """Set the calling thread's floating-point mode to C's default, and restore it at the end.

    A context manager and a decorator; takes about a microsecond.

    Args:
        pool: also for the threads on which torch runs large operations. They keep the mode in which
            they were started, and no call changes it. If their mode differs, torch uses one thread
            until the context ends (`torch.set_num_threads`).

    Raises:
        RuntimeError: the thread does not round to nearest, and the C kernels, which could change
            that, were not built.
    """

    def __init__(self, *, pool: bool = False) -> None:
        self._pool = pool

    def _recreate_cm(self) -> "default_mode":  # calls may overlap
        return default_mode(pool=self._pool)

    def __enter__(self) -> None:
        self._before, self._threads = _functions()[0](), 0
        if self._pool:
            threads = torch.get_num_threads()
            if threads > 1 and not _pool_has_default_mode(threads):
                self._threads = threads
                torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        _functions()[1](self._before)


def assign_(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """out <- x, rounded to the dtype of out; every NaN becomes the canonical NaN.

    That is 0x7fc00000 in float32, 0x7fc0 in bfloat16 and 0x7e00 in float16.
    """
    if out.is_neg():  # its memory holds the negated values
        assign_(torch._neg_view(out), -x)
        return out
    out.copy_(x)
    bits = out.view(_INTEGER[out.element_size()])
    bits.masked_fill_(out.isnan(), _NAN[out.dtype])
    return out


@cache
def _functions() -> tuple[Callable[[], int], Callable[[int], object]]:
    """Two functions: one sets the default mode and returns the previous one; the other restores a
    mode."""
    from rhtcomm.kernels import cpu  # imports quantizers, which import this module

    path = cpu.library_path()
    try:
        return cpu.mode_functions(path) if path else (_set_default_by_torch, _give_back_by_torch)
    except (OSError, RuntimeError):  # an explicit request for the C kernels raises elsewhere
        return _set_default_by_torch, _give_back_by_torch


_ONE, _TINY = 1.0, 5e-324  # variables, since the compiler would fold constants


def _set_default_by_torch() -> int:
    """Whether subnormals were flushed; torch can set this mode but not query it."""
    flushed = _TINY * _ONE == 0
    if flushed:
        torch.set_flush_denormal(False)
    if _ONE + _TINY - _TINY != _ONE:
        if flushed:
            torch.set_flush_denormal(True)
        raise RuntimeError(
            "rhtcomm: this thread does not round to nearest (fesetround), and rhtcomm cannot "
            "change that without its C kernels; set FE_TONEAREST, or install the C kernels"
        )
    return int(flushed)


def _give_back_by_torch(flushed: int) -> None:
    if flushed:
        torch.set_flush_denormal(True)


def _pool_has_default_mode(threads: int) -> bool:
    """Whether 1 + x - x - 1 + x = x for a subnormal x in all threads: not if one flushes subnormals
    or does not round to nearest."""
    tiny = torch.ones(1, dtype=torch.int32, device="cpu").view(torch.float32)
    x = tiny.expand(threads * GRAIN) + 1.0
    x.sub_(tiny).sub_(1.0).add_(tiny)
    return bool((x.view(torch.int32) == 1).all())
