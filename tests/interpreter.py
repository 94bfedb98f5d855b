"""The Triton kernels in Triton's interpreter, in a process of its own.

TRITON_INTERPRET must be set before Triton is imported, and then holds for the whole process.
"""

import os
from typing import Any

import pytest
import torch

from rhtcomm import Codec, Key
from rhtcomm.codec import _layout
from rhtcomm.kernels import Task, kernel_for

__all__ = [
    "bits_of",
    "both_ways",
    "decode",
    "encode_and_decode",
    "interpret",
    "moments_of",
    "tuned",
]


def interpret() -> None:
    """For the start of the process."""
    os.environ.update(TRITON_INTERPRET="1", RHTCOMM_KERNELS="gpu")
    torch.set_num_threads(1)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """(numel,) int32, so that 0 does not equal -0, while all NaN are one."""
    return torch.where(x.isnan(), torch.nan, x.float()).view(torch.int32)


def both_ways(
    codec: Codec, xs: list[torch.Tensor], key: Key, first: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """All payloads, and the bits of the decoded mean."""
    payloads = torch.stack(
        [codec.encode(x, key, rank, len(xs), first=first) for rank, x in enumerate(xs)]
    )
    return payloads, decode(codec, payloads, key, xs[0].numel(), first, dtype)


def decode(
    codec: Codec, payloads: torch.Tensor, key: Key, numel: int, first: int, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty(numel, dtype=dtype)
    return bits_of(codec.decode_mean(payloads, key, numel, first=first, out=out))


def encode_and_decode(case: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A case of golden/make.py."""
    payloads = case.encode()
    return payloads, case.decode(payloads)


def in_shards(codec: Codec, x: torch.Tensor, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
    """Payloads of three, and what they decode to."""
    payloads = codec.encode(x, key, 1, 4, first=codec.block, shards=3)
    place = {"first": codec.block, "rank": 1, "world_size": 4}
    return payloads, codec.decode_shards(payloads, key, x.numel(), **place)


def moments_of(codec: Codec, x: torch.Tensor, key: Key) -> torch.Tensor:
    """(B, 10), of tensors of whole blocks."""
    payload = codec.encode(x, key)
    (section,) = _layout(codec, x.numel())
    moments = torch.full((section.blocks.count, 10), -1.0)
    kernel: Any = kernel_for(x.device, codec.quantizer)
    task = Task(codec._rotation(None), codec.quantizer, key, section, 0, 0, 1)
    kernel.encode(task, x, payload[None], moments)
    return moments


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

    def seconds(call: Any) -> float:
        call()
        timed.append(launched[-1])
        return abs(launched[-1] - 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_encode", Kernel(gpu._encode))
        patch.setattr(gpu, "_decode", Kernel(gpu._decode))
        patch.setattr(gpu, "_seconds", seconds)
        patch.setattr(gpu, "_can_time", lambda device: True)
        patch.setattr(gpu, "_TUNED_FROM", 2)
        patch.setattr(gpu, "_fastest", {})
        for _ in range(2):
            payload = codec.encode(x, key)
            mean = codec.decode_mean(payload[None], key, x.numel())
    return mean, timed, launched
