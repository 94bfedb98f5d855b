"""The Triton kernels as compiled for GPUs against the torch reference: the same bits, always.

No GPU is needed: `ptx` runs what Triton compiles, and notices races, which Triton's interpreter
cannot have.
"""

from typing import Any

import pytest
import torch
from interpreter import needs_triton
from problems import gaussian

from rhtcomm import Codec, Key, QuicFL
from rhtcomm.kernels import Kernel, reference

pytestmark = needs_triton
KEY = Key(2**64 - 3, step=2**32 - 1, bucket=2**31 + 5, hop=15)


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def both_ways(
    kernel: Kernel, codec: Codec, xs: list[torch.Tensor], shift: int = 0
) -> list[torch.Tensor]:
    """Payloads of all ranks, the bits of the mean, and those of the mean of bytes at random."""
    numel, ranks, offset = len(xs[0]), len(xs), 7 * codec.block
    task = codec.task(numel)
    payloads = torch.full((ranks, 1, codec.nbytes(numel)), 165, dtype=torch.uint8)
    for rank, x in enumerate(xs):
        kernel.encode(task, KEY, offset, rank, ranks, x, payloads[rank])
    found = [payloads]
    random = torch.Generator().manual_seed(5)
    garbage = torch.randint(256, payloads.shape, dtype=torch.uint8, generator=random)
    for section in task.sections:
        scales, _ = section.views(garbage)
        scales.copy_(torch.randn(scales.shape, generator=random))
    for given in (payloads, garbage):
        out = torch.zeros(shift + numel, dtype=xs[0].dtype)[shift:]
        kernel.decode(task, KEY, offset, 0, ranks, given, out)
        found.append(raw(out))
    return found


def inputs(numel: int, ranks: int, dtype: torch.dtype, shift: int = 0) -> list[torch.Tensor]:
    """Of different magnitudes; `shift` coordinates behind an aligned address."""
    return [
        (gaussian(shift + numel, rank) * (0.3 + rank)).to(dtype)[shift:] for rank in range(ranks)
    ]


CASES: list[Any] = [
    (QuicFL(4), 2, 256, 600, torch.float32, 2, None, 0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}-{case[4]}")
def test_same_bits_as_the_reference(case: Any) -> None:
    from emulated import emulated

    from rhtcomm.kernels import gpu

    quantizer, rotations, size, numel, dtype, ranks, warps, shift = case
    codec, xs = Codec(quantizer, rotations, size), inputs(numel, ranks, dtype, shift)
    with emulated(warps):
        found = both_ways(gpu, codec, xs, shift)
    for one, other in zip(found, both_ways(reference, codec, xs, shift), strict=True):
        assert torch.equal(one, other)
