"""What a Reducer does not compress, or not by its own codec."""

import pytest
import torch
from groups import two_levels
from harness import Ranks
from problems import CANONICAL_NAN, DTYPES, nmse, numbers
from simulation import BLOCK, CODEC, same_bits

import rhtcomm
from rhtcomm import Codec, Eden, Key, Lattice, QuicFL
from rhtcomm.communicators import Topology
from rhtcomm.reduce import Reducer, Treatment

FEEDBACK = Codec(Eden(4, biased=True), block=BLOCK)


def reduce_float64(rank: int, world_size: int, nodes: int) -> list[torch.Tensor]:
    communicator: Topology = rhtcomm.TorchCommunicator()
    if nodes > 1:
        communicator = two_levels(rank, nodes, world_size // nodes)
    kept, results = Reducer(CODEC, communicator, min_numel=0), []
    kept.mean_(integers(rank, 0).float(), Key(1), lengths=(1000, 4000))  # compressed
    for step in range(2):
        x = integers(rank, step)
        report = kept.mean_(x, Key(0, step), lengths=(1000, 4000))
        assert (report.rotations, report.wanted_rotations) == (None, None)
        results.append(x)
    return results


def integers(rank: int, step: int) -> torch.Tensor:
    """Multiples of 2^-40 below 2^10, which float64 adds exactly, and float32 cannot hold."""
    random = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(-(1 << 50), 1 << 50, (5000,), generator=random).double() / (1 << 40)


@pytest.mark.parametrize(("world_size", "nodes"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_float64_travels_exactly(world_size: int, nodes: int, ranks: Ranks) -> None:
    for results in ranks.run(reduce_float64, world_size, nodes):
        for step, result in enumerate(results):
            exact = sum(integers(rank, step) for rank in range(world_size)) / world_size
            assert isinstance(exact, torch.Tensor)
            assert torch.equal(result, exact)
            assert not torch.equal(result, result.float().double())


def reduce_nothing(rank: int, world_size: int) -> list[int]:
    communicator, sent = rhtcomm.TorchCommunicator(), []
    communicator.all_reduce_ = None  # type: ignore[assignment, method-assign]  # nobody needs it
    for codec in (CODEC, Lattice(block=BLOCK)):
        for min_numel in (0, 1):
            kept = Reducer(codec, communicator, min_numel=min_numel)
            sent.append(kept.mean_(torch.empty(0), Key(0)).bytes_sent)
            kept.mean_(torch.empty(0), Key(0), lengths=(0, 0), residual=torch.empty(0))
    return sent


def test_an_empty_tensor(ranks: Ranks) -> None:
    assert ranks.run(reduce_nothing, 2) == [[0] * 4] * 2


def be_alone(rank: int, world_size: int) -> None:
    kept = Reducer(CODEC, rhtcomm.TorchCommunicator(), min_numel=0)
    for dtype in (*DTYPES, torch.float64):
        x = numbers(rank, shape=(5000,)).to(dtype)
        x[7] = torch.inf
        before = x.clone()
        report = kept.mean_(x, Key(0))
        assert same_bits(x, before)
        assert (report.bytes_sent, report.bytes_uncompressed, report.rotations) == (0, 0, None)


def test_one_rank_alone_keeps_its_tensor(ranks: Ranks) -> None:
    ranks.run(be_alone, 1)


def keep_what_rounding_loses(rank: int, world_size: int) -> list[torch.Tensor]:
    """Error feedback of one rank alone, with 16-bit numbers: x and a small residual."""
    kept, results = Reducer(FEEDBACK, rhtcomm.TorchCommunicator()), []
    for dtype in DTYPES:
        residual = numbers(3, shape=(5000,)) / 1000
        x = numbers(rank, shape=(5000,)).to(dtype)
        x[4000:] = 0
        total = x.float() + residual
        kept.mean_(x, Key(0), lengths=(4000, 1000), residual=residual)
        results += [total, x, residual]
        nan = numbers(rank, shape=(5000,)).to(dtype)
        nan[3] = -torch.nan
        kept.mean_(nan, Key(1), residual=residual.clone())
        bits = nan[3:4].view(torch.int32 if dtype == torch.float32 else torch.int16)
        assert bits.item() == CANONICAL_NAN[dtype]
    return results


def test_feedback_of_one_rank_keeps_what_rounding_loses(ranks: Ranks) -> None:
    [results] = ranks.run(keep_what_rounding_loses, 1)
    start = numbers(3, shape=(5000,)) / 1000
    for total, x, residual in zip(results[::3], results[1::3], results[2::3], strict=True):
        assert same_bits(x[:4000], total[:4000].to(x.dtype))
        assert same_bits(residual[:4000], (total - x.float())[:4000])
        assert not x[4000:].any()  # an unused segment is not moved by what is left,
        assert same_bits(residual[4000:], start[4000:])  # which stays


# ---- Treatments -------------------------------------------------------------------------------

TREATMENTS = {
    "another codec": Treatment(Codec(QuicFL(2), block=BLOCK)),
    "no codec": Treatment(None),
    "mixed": Treatment(CODEC, exact=(False, True, False, True)),
    "compared": Treatment(CODEC, exact=(False, True, False, True), compare=True),
}
MIXED = (1500, 10, 9 * BLOCK, 700)


def treat(rank: int, world_size: int, how: str) -> list[torch.Tensor]:
    communicator = rhtcomm.TorchCommunicator()
    kept, results = Reducer(CODEC, communicator, min_numel=2000), []
    for step in range(2):
        x = numbers(rank, step, shape=(sum(MIXED),))
        kept.mean_(x, Key(0, step), lengths=MIXED, treatment=TREATMENTS[how])
        results.append(x)
    # The same reducer's own codec, for tensors of that length.
    x, y = (numbers(rank, shape=(sum(MIXED),)) for _ in range(2))
    kept.mean_(x, Key(1), lengths=MIXED)
    Reducer(CODEC, communicator, min_numel=2000).mean_(y, Key(1), lengths=MIXED)
    assert same_bits(x, y)
    return results


@pytest.mark.parametrize("how", TREATMENTS)
def test_a_tensor_is_treated_as_told(how: str, ranks: Ranks) -> None:
    outcomes = ranks.run(treat, 2, how)
    assert all(map(same_bits, *outcomes))
    for step, mean in enumerate(outcomes[0]):
        inputs = [numbers(rank, step, shape=(sum(MIXED),)) for rank in range(2)]
        exact = (inputs[0] + inputs[1]) / 2
        errors = [
            nmse(found, wanted)
            for found, wanted in zip(mean.split(MIXED), exact.split(MIXED), strict=True)
        ]
        if how == "another codec":
            assert all(0.03 < error < 1 for error in errors)
        elif how == "no codec":
            assert same_bits(mean, exact)
        else:
            assert errors[1] == errors[3] == 0
            assert 0 < errors[0] < 0.05
            assert 0 < errors[2] < 0.05
