"""What test_mpi.py runs under mpiexec: `python -m mpi4py mpi_cases.py CASE`; an error ends all."""

import gc
import hashlib
import os
import sys
import weakref

import numpy as np
import pytest
import torch
from harness import limit
from lattices import sum_of
from mpi4py import MPI

import rhtcomm
from rhtcomm import (
    ECDQ,
    Codec,
    DisagreementError,
    Eden,
    HierarchicalCommunicator,
    Key,
    Lattice,
    MPICommunicator,
    QuicFL,
)
from rhtcomm.kernels import lattice_kernel_for
from rhtcomm.reduce.split import split_into_chunks

WORLD = MPI.COMM_WORLD


def same_everywhere(x: torch.Tensor) -> bool:
    return len(set(WORLD.allgather(hashlib.sha256(x.numpy().tobytes()).hexdigest()))) == 1


def exchanges() -> None:
    communicator = MPICommunicator(timeout=limit(30))
    rank, n = communicator.rank, communicator.world_size
    for length in (1, 1000, 3_000_001):
        mine = torch.full((length,), rank + 1, dtype=torch.uint8)
        gathered = communicator.all_gather(mine)
        assert torch.equal(gathered, torch.arange(1, n + 1, dtype=torch.uint8)[:, None] + 0 * mine)
        before = communicator.bytes_sent
        received = communicator.all_to_all(torch.arange(n, dtype=torch.uint8)[:, None] * 10 + mine)
        expected = 10 * rank + torch.arange(1, n + 1, dtype=torch.uint8)
        assert torch.equal(received, expected[:, None].expand(n, length))
        assert communicator.bytes_sent - before == (n - 1) * length
        before = communicator.bytes_sent
        in_flight = [communicator.start_gather(mine), communicator.start_broadcast(mine.clone())]
        collected, announced = (finish() for finish in in_flight)
        assert collected is None if rank else torch.equal(collected, gathered)
        assert torch.equal(announced, torch.ones_like(mine))
        assert communicator.bytes_sent - before == (length if rank else (n - 1) * length)
    x = torch.arange(10.0) * (rank + 1)
    communicator.all_reduce_(x)
    assert torch.equal(x, torch.arange(10.0) * (n * (n + 1) // 2))
    assert x.untyped_storage().resizable(), "whoever owns x may free it by resize_(0)"
    with pytest.raises(ValueError, match="not contiguous"):
        communicator.all_reduce_(torch.ones(10)[::2])
    for dtype in (torch.bfloat16, torch.float16, torch.uint8, torch.bool):
        for op in ("sum", "max"):
            with pytest.raises(TypeError, match=rf"cannot be trusted to add {dtype}; pass x.float"):
                communicator.all_reduce_(torch.ones(4, dtype=dtype), op)  # type: ignore[arg-type]
    communicator.close()


def means() -> None:
    communicator = MPICommunicator(timeout=limit(30))
    rank, n = communicator.rank, communicator.world_size
    numel, key = 3 * 4096 + 1234, Key(1, step=2, bucket=3)
    xs = [torch.randn(numel, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    exact = torch.stack(xs).double().mean(dim=0)
    for quantizer in (QuicFL(4), Eden(4), ECDQ(3.5)):
        codec = Codec(quantizer)
        payloads = torch.stack([codec.encode(x, key, r, n) for r, x in enumerate(xs)])
        for algorithm in ("all_gather", "two_shot", "gather"):
            x = xs[rank].clone()
            rhtcomm.all_reduce(x, codec, key, communicator, algorithm=algorithm, min_numel=0)
            assert same_everywhere(x), (quantizer, algorithm)
            error = ((x - exact).square().sum() / exact.square().sum()).item()
            hops = 1 if algorithm == "all_gather" else 2
            assert error < 1.3 * hops * 0.0117, (quantizer, algorithm, error)
            if algorithm == "all_gather":
                assert torch.equal(x, codec.decode_mean(payloads, key, numel))
    # Two levels, with two ranks a node.
    within, between = WORLD.Split(rank // 2, rank), WORLD.Split(rank % 2, rank)
    levels = HierarchicalCommunicator(MPICommunicator(within), MPICommunicator(between))
    x = xs[rank].clone()
    rhtcomm.all_reduce(x, Codec(QuicFL(4)), key, levels, min_numel=0)
    assert same_everywhere(x)
    assert ((x - exact).square().sum() / exact.square().sum()).item() < 1.3 * 0.0117
    # In two chunks, each of which makes two all-reduces.
    numel = 2 * n * (1 << 18)
    large = [torch.randn(numel, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    chunks = split_into_chunks(numel, 4096, n)
    assert len(chunks) == 2
    kernel = lattice_kernel_for(torch.device("cpu"))
    parts = [
        sum_of(Lattice(4), [x[chunk] for x in large], key, chunk.start, kernel).mean
        for chunk in chunks
    ]
    rhtcomm.all_reduce(large[rank], Lattice(4), key, communicator)
    assert torch.equal(large[rank], torch.cat(parts))
    small = xs[rank][:100].clone()
    rhtcomm.all_reduce(small, Codec(QuicFL(1)), key, communicator)
    assert torch.allclose(small, exact[:100].float(), atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        of_dtype(dtype, communicator, levels)
    communicator.close()


def of_dtype(
    dtype: torch.dtype, communicator: MPICommunicator, levels: HierarchicalCommunicator
) -> None:
    """The mean of 16-bit tensors, whether MPI adds them up or their payloads travel."""
    rank, n = communicator.rank, communicator.world_size
    eps, key = torch.finfo(dtype).eps, Key(4)
    xs = [torch.randn(5000, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(n)]
    exact = torch.stack(xs).double().mean(dim=0)
    for codec in (Codec(QuicFL(8)), Lattice(8)):
        for topology in (communicator, levels):
            for uncompressed in (True, False):
                x = xs[rank].clone()
                least = 2 * x.numel() if uncompressed else 0
                rhtcomm.all_reduce(x, codec, key, topology, min_numel=least)
                assert same_everywhere(x.view(torch.int16))
                tolerance = eps if uncompressed else 0.05
                assert torch.allclose(x.double(), exact, rtol=eps, atol=tolerance), (dtype, codec)


def disagreement() -> None:
    communicator = MPICommunicator(timeout=limit(30))
    codec = Codec(QuicFL(4 if communicator.rank else 3))
    with pytest.raises(DisagreementError, match=r"bits \(3 on rank 0; 4 on rank"):
        rhtcomm.all_reduce(torch.randn(50_000), codec, Key(0), communicator)
    communicator.close()


def timeout() -> None:
    communicator = MPICommunicator(timeout=0.5)
    if communicator.rank == 0:
        memory = np.zeros(10, dtype=np.uint8)
        alive = weakref.ref(memory)
        with pytest.raises(TimeoutError, match=r"rank 0 of .* waited 0.5 s for the others"):
            communicator.all_gather(torch.from_numpy(memory))
        del memory
        gc.collect()
        assert alive() is not None, "MPI may still use it"
        print("timed out", flush=True)
        os._exit(0)  # a started exchange cannot be taken back, so neither can MPI be finalized
    MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)  # waits for rank 0, which never comes


if __name__ == "__main__":
    torch.set_num_threads(1)
    {case.__name__: case for case in (exchanges, means, disagreement, timeout)}[sys.argv[1]]()
