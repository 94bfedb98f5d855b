"""Ranks whose threads compute in other floating-point modes get the same bits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, run_program
from problems import CANONICAL_NAN, DTYPES
from states import submit

import rhtcomm
from rhtcomm import ECDQ, Codec, Eden, HierarchicalCommunicator, Key, Lattice, QuicFL
from rhtcomm.hooks import RHTState

EXCHANGES: dict[str, dict[str, Any]] = {
    "compressed": {"codec": Codec(QuicFL(4), block=256)},
    "two_shot": {"codec": Codec(QuicFL(4), block=256), "algorithm": "two_shot"},
    "ecdq": {"codec": Codec(ECDQ(2.5), block=256), "feedback": True},
    "lattice": {"codec": Lattice(4, block=256)},
    "uncompressed": {"codec": Codec(QuicFL(4)), "min_numel": 1 << 20},
    "feedback": {"codec": Codec(Eden(4, biased=True), block=256), "feedback": True},
    "one node": {"codec": Codec(QuicFL(4), block=256), "levels": "one node"},
    "two nodes": {"codec": Codec(QuicFL(4), block=256), "levels": "two nodes"},
}


def levels(rank: int, how: str) -> HierarchicalCommunicator:
    """Two ranks that make up one node, or a node each."""
    alone = [dist.new_group([other]) for other in range(2)][rank]
    pair = (dist.group.WORLD, alone)
    return HierarchicalCommunicator(*(pair if how == "one node" else pair[::-1]))


def exchange_subnormals(
    rank: int, world_size: int, how: str, dtype: torch.dtype, numel: int, threads: int, flush: bool
) -> torch.Tensor:
    """Rank 1 flushes subnormal numbers to zero, from before its threads were started."""
    options = {"min_numel": 0, **EXCHANGES[how]}
    codec, feedback = options.pop("codec"), options.pop("feedback", False)
    two_levels = options.pop("levels", None)
    communicator: Any = levels(rank, two_levels) if two_levels else rhtcomm.TorchCommunicator()
    scale = 1e-6 if dtype == torch.float16 else 1e-38
    x = torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * scale
    x = x.to(dtype)
    residual = torch.zeros(numel) if feedback else None
    torch.set_flush_denormal(flush and rank == 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(2):
            mean = x.clone()
            rhtcomm.all_reduce(
                *(mean, codec, Key(0, step), communicator),
                residual=residual,
                **options,
            )
        flushes = bool(torch.tensor([1e-40]) * 1.0 == 0)
        assert flushes == (flush and rank == 1), "the mode was not given back"
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    return mean


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", EXCHANGES)
def test_a_rank_that_flushes_subnormals_gets_the_same_bits(
    how: str, dtype: torch.dtype, threads: int, ranks: Ranks
) -> None:
    numel = 100_000 if threads > 1 else 3000
    arguments = (how, dtype, numel, threads)
    means = ranks.run(exchange_subnormals, 2, *arguments, True)
    means += ranks.run(exchange_subnormals, 2, *arguments, False)
    assert means[0].any()
    for mean in means[1:]:
        assert torch.equal(mean.view(torch.int16), means[0].view(torch.int16))


THREADS_THAT_FLUSH = """
import hashlib, torch
torch.set_flush_denormal({flush})
torch.set_num_threads(2)
import torch.distributed as dist
import rhtcomm
dist.init_process_group("gloo")
rank = dist.get_rank()
alone = [dist.new_group([other]) for other in range(2)][rank]
flat, world = rhtcomm.TorchCommunicator(), dist.group.WORLD
kinds = {{
    "flat": flat,
    "one node": rhtcomm.HierarchicalCommunicator(world, alone),
    "two nodes": rhtcomm.HierarchicalCommunicator(alone, world),
    "feedback": flat,
}}
for name, communicator in kinds.items():
    residual = torch.zeros(200_000) if name == "feedback" else None
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((200_000,), 2**21, dtype=torch.int32).view(torch.float32).to(dtype)
        codec = rhtcomm.Codec(rhtcomm.QuicFL(8))
        rhtcomm.all_reduce(x, codec, rhtcomm.Key(0), communicator, residual=residual)
        digest = hashlib.sha256(x.view(torch.int16).numpy().tobytes()).hexdigest()
        if rank == 0:
            print(name, dtype, digest)
dist.destroy_process_group()
"""


def test_threads_of_torch_that_flush_change_no_sum() -> None:
    """Those that were started in that mode: two levels and error feedback sum by torch."""
    usual, flushing = (
        [line for line in first.stdout.splitlines() if "torch." in line]
        for first, _ in (
            run_program(THREADS_THAT_FLUSH.format(flush=flush), world_size=2)
            for flush in (False, True)
        )
    )
    assert len(usual) == 8
    assert flushing == usual


def exchange_nans(rank: int, world_size: int, how: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.ones(3000).to(dtype)
    x.view(torch.int32 if dtype == torch.float32 else torch.int16)[3::1000] = -63  # a NaN
    codec = Codec(QuicFL(4), block=256)
    rhtcomm.all_reduce(x, codec, Key(0), levels(rank, how), min_numel=0)
    return x[3::1000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["one node", "two nodes"])
def test_two_levels_give_the_canonical_nan(how: str, dtype: torch.dtype, ranks: Ranks) -> None:
    for nans in ranks.run(exchange_nans, 2, how, dtype):
        bits = nans.view(torch.int32 if dtype == torch.float32 else torch.int16)
        assert bits.tolist() == [CANONICAL_NAN[dtype]] * 3


def exchange_float64_subnormals(rank: int, world_size: int) -> torch.Tensor:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    buffer = x * 1e-308
    torch.set_flush_denormal(rank == 1)  # which the hook's thread takes over
    try:
        with RHTState() as state:
            submit(state, buffer).wait()
    finally:
        torch.set_flush_denormal(False)
    return buffer


def test_float64_that_is_not_compressed_keeps_its_subnormals(ranks: Ranks) -> None:
    first, second = ranks.run(exchange_float64_subnormals, 2)
    assert torch.equal(first.view(torch.int64), second.view(torch.int64))
