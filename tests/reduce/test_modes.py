"""What torch computes around the kernels does not depend on the mode of the thread either."""

import ctypes
import ctypes.util
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from harness import Ranks
from simulation import BLOCK, CODEC

import rhtcomm
from rhtcomm import Key, Lattice
from rhtcomm.moments import MOMENTS, rotations_for
from rhtcomm.reduce import Reducer, Treatment


@contextmanager
def flushing(flush: bool) -> Iterator[None]:
    """Subnormal numbers are flushed to zero on this thread."""
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of fesetround")
@pytest.mark.parametrize("direction", [0x400, 0x800, 0xC00])
def test_wishes_do_not_depend_on_the_rounding(direction: int) -> None:
    """What one input is allowed by a hair, it is allowed in every mode."""
    moments = torch.rand(50, MOMENTS, generator=torch.Generator().manual_seed(1)) + 1
    low, high = 0.0, 1.0  # the least tolerance that allows one rotation lies between them
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if rotations_for(moments, 1, 2, middle) == 1 else (middle, high)
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    assert libm.fesetround(direction) == 0
    try:
        rotations = [rotations_for(moments, 1, 2, tolerance) for tolerance in (low, high)]
    finally:
        libm.fesetround(0)
    assert rotations == [2, 1]


TREATMENTS = {
    "compressed": None,
    "lattice": Treatment(Lattice(4, block=BLOCK)),
    "exact": Treatment(None),
    "mixed": Treatment(CODEC, exact=(True, False)),
}


def reduce_subnormals(rank: int, world_size: int, how: str, flush: bool) -> torch.Tensor:
    """Rank 1 flushes subnormal numbers, where it does."""
    x = torch.randn(3000, generator=torch.Generator().manual_seed(rank)) * 1e-38
    reducer = Reducer(CODEC, rhtcomm.TorchCommunicator(), min_numel=0)
    with flushing(flush and rank == 1):
        reducer.mean_(x, Key(0), lengths=(1000, 2000), treatment=TREATMENTS[how])
    return x


@pytest.mark.parametrize("how", TREATMENTS)
def test_a_rank_that_flushes_subnormals_gets_the_same_bits(how: str, ranks: Ranks) -> None:
    means = [*ranks.run(reduce_subnormals, 2, how, True)]
    means += ranks.run(reduce_subnormals, 2, how, False)
    assert ((means[0] != 0) & (means[0].abs() < 2.0**-126)).any(), "no number is subnormal"
    for mean in means[1:]:
        assert torch.equal(mean.view(torch.int32), means[0].view(torch.int32))
