"""The Triton kernels in Triton's interpreter, in a process of its own.

TRITON_INTERPRET must be set before Triton is imported, and then holds for the whole process.
"""

import os
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

import rhtcomm.quantizers.ecdq
import rhtcomm.wire
from rhtcomm import ECDQ, Codec, Key
from rhtcomm.kernels import kernel_for

__all__ = [
    "Interpreted",
    "bits_of",
    "both_ways",
    "both_ways_in_short_units",
    "decode",
    "encode_and_decode",
    "has_triton",
    "interpret",
    "mend",
    "misused",
    "moments_of",
    "needs_triton",
    "ranks_in_shards",
    "tuned",
    "with_units_of",
]

Interpreted = Callable[..., Any]  # the fixture of conftest.py


def _has_triton() -> bool:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # builds for other devices have other names
        return find_spec("triton") is not None
    return tuple(map(int, version.split(".")[:2])) >= (3, 6)


has_triton = _has_triton()
needs_triton = pytest.mark.skipif(not has_triton, reason="Triton 3.6 is not installed")


def interpret() -> None:
    """For the start of the process."""
    os.environ.update(TRITON_INTERPRET="1", RHTCOMM_KERNELS="gpu")
    torch.set_num_threads(1)
    mend()


def mend() -> None:
    """Make up for what Triton's interpreter does otherwise from version to version.

    In the interpreter a scalar is an array of shape (1,), of which Triton 3.6 makes an `int`, for
    loops over a scalar argument, in a way that NumPy 2.4 no longer accepts.

    In the interpreter `tl.fma` rounds twice up to Triton 3.7; later, and on devices, once. And
    `umulhi` of negative int32 is wrong. So an AssertionError meets kernels for which either would
    matter.
    """
    if not has_triton:
        return
    from triton import __version__
    from triton.runtime import interpreter

    if __version__.startswith("3.6."):
        patch = interpreter._patch_lang_tensor

        def patch_lang_tensor(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

        interpreter._patch_lang_tensor = patch_lang_tensor

    builder = interpreter.InterpreterBuilder
    fma, umulhi = builder.create_fma, builder.create_umulhi

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        product = x.data.astype(np.float64) * y.data
        exact = np.isclose(product, x.data * y.data, rtol=0, atol=0, equal_nan=True)
        assert exact.all(), "tl.fma of products that are not exact rounds once, or twice"
        return fma(self, x, y, z)

    def create_umulhi(self: Any, x: Any, y: Any) -> Any:
        unsigned = x.data.dtype.kind == y.data.dtype.kind == "u"
        assert unsigned, "umulhi of signed integers is wrong in the interpreter"
        return umulhi(self, x, y)

    builder.create_fma, builder.create_umulhi = create_fma, create_umulhi


def misused(name: str, argument: object) -> object:
    """What a kernel of misuses.py makes of it."""
    import misuses

    return getattr(misuses, name)(argument)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """(numel,) int32, so that 0 does not equal -0, while all NaN are one."""
    return torch.where(x.isnan(), torch.nan, x.float()).view(torch.int32)


def both_ways(
    codec: Codec, xs: list[torch.Tensor], key: Key, offset: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """All payloads, and the bits of the decoded mean."""
    payloads = torch.stack(
        [codec.encode(x, key, rank, len(xs), offset=offset) for rank, x in enumerate(xs)]
    )
    return payloads, decode(codec, payloads, key, xs[0].numel(), offset, dtype)


def decode(
    codec: Codec, payloads: torch.Tensor, key: Key, numel: int, offset: int, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty(numel, dtype=dtype)
    return bits_of(codec.decode_mean(payloads, key, numel, offset=offset, out=out))


def encode_and_decode(case: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A case of golden/make.py."""
    payloads = case.encode()
    return payloads, case.decode(payloads)


def in_shards(codec: Codec, x: torch.Tensor, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
    """Payloads of three, and what they decode to."""
    payloads = codec.encode(x, key, 1, 4, offset=codec.block, shards=3)
    origin = {"offset": codec.block, "rank": 1, "world_size": 4}
    return payloads, codec.decode_shards(payloads, key, x.numel(), **origin)


def ranks_in_shards(
    codec: Codec, xs: list[torch.Tensor], key: Key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Payloads of all ranks, each in three shards, in rows that are too long; and their mean."""
    numel = xs[0].numel()
    coder, out = codec.coder(numel, 3), torch.empty(numel)
    payloads = torch.zeros(len(xs), 3, coder.nbytes + 12, dtype=torch.uint8)
    for rank, x in enumerate(xs):
        coder.encode(x, key, 2 * codec.block, rank, len(xs), payloads[rank])
    coder.decode(payloads, key, 2 * codec.block, 0, len(xs), out)
    return payloads, out


def moments_of(codec: Codec, x: torch.Tensor, key: Key) -> torch.Tensor:
    """(B, 10), of tensors of whole blocks."""
    payload, task = codec.encode(x, key), codec.task(x.numel())
    moments = torch.full((task.blocks, 10), -1.0)
    kernel_for(x.device, codec.quantizer).encode(task, key, 0, 0, 1, x, payload[None], moments)
    return moments


def with_units_of(nbytes: int, codec: Codec, x: torch.Tensor, key: Key) -> torch.Tensor:
    """A payload of ECDQ whose units have so many bytes, whatever they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ECDQ, "unit_bytes", lambda self, numel: nbytes if numel else 0)
        rhtcomm.wire.layout.cache_clear()
        codec = Codec(codec.quantizer, codec.rotations, codec.block)  # codecs keep layouts too
        try:
            payload = torch.full((codec.nbytes(len(x)),), 165, dtype=torch.uint8)
            return codec.encode(x, key, out=payload)
        finally:
            rhtcomm.wire.layout.cache_clear()


def both_ways_in_short_units(
    codec: Codec, x: torch.Tensor, key: Key
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `both_ways`, of ECDQ with units of two blocks of 4096."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rhtcomm.quantizers.ecdq, "UNIT", 2 * 4096)
        rhtcomm.wire.layout.cache_clear()
        try:
            return both_ways(codec, [x], key, 0, torch.float32)
        finally:
            rhtcomm.wire.layout.cache_clear()


def tuned(codec: Codec, x: torch.Tensor, key: Key) -> tuple[torch.Tensor, list[int], list[int]]:
    """What a payload decodes to, and the warps that were timed and those of each launch.

    The clock says that two warps are fastest.
    """
    from rhtcomm.kernels import gpu

    timed: list[int] = []
    launched: list[int] = []

    class Kernel:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                launched.append(options["num_warps"])
                self.kernel[grid](*args, **options)

            return launch

    class Clock(gpu.Tuner):
        least = 2

        def can_time(self, device: torch.device) -> bool:
            return True

        def seconds(self, call: Any) -> float:
            call()
            timed.append(launched[-1])
            return abs(launched[-1] - 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "encode_block", Kernel(gpu.encode_block))
        patch.setattr(gpu, "decode_block", Kernel(gpu.decode_block))
        patch.setattr(gpu, "tuner", Clock())
        for _ in range(2):
            payload = codec.encode(x, key)
            mean = codec.decode_mean(payload[None], key, x.numel())
    return mean, timed, launched
