"""Reducer.scatter_ again and again, on real ranks: kept routes, segments, exclusions, rotations."""

import pytest
import torch
from harness import Ranks
from simulation import BLOCK, CODEC, data, same_bits

import rhtcomm
from rhtcomm import Codec, Key, QuicFL
from rhtcomm.reduce import Reducer, Treatment

LENGTHS, ROWS = (3 * BLOCK, 640, 77), (1, 10, 1)
NUMEL = sum(LENGTHS)  # of a shard


def spread(rank: int, world_size: int) -> torch.Tensor:
    """Of whose rows of the second parameter some are zero on one rank, and one on all."""
    shards = data(rank, world_size * NUMEL).view(world_size, NUMEL)
    rows = shards[:, 3 * BLOCK : 3 * BLOCK + 640].view(world_size, 10, 64)
    rows[:, rank] = 0
    rows[:, 7] = 0
    return shards


def scatter(rank: int, world_size: int) -> list[torch.Tensor]:
    reducer, results = Reducer(CODEC, rhtcomm.TorchCommunicator(), min_numel=0), []
    for step in range(2):
        output = torch.full((NUMEL,), torch.nan)
        flat = spread(rank, world_size).view(-1)
        reducer.scatter_(output, flat, Key(3, step), lengths=LENGTHS, rows=ROWS)
        results.append(output)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_segments_that_no_rank_uses_are_zeros_and_others_as_decoded(
    world_size: int, ranks: Ranks
) -> None:
    inputs = [spread(rank, world_size) for rank in range(world_size)]
    stride = -(-NUMEL // BLOCK) * BLOCK
    for rank, results in enumerate(ranks.run(scatter, world_size)):
        for step, found in enumerate(results):
            payloads = [
                CODEC.encode(x[rank], Key(3, step), i, world_size, offset=rank * stride)
                for i, x in enumerate(inputs)
            ]
            expected = CODEC.decode_mean(
                torch.stack(payloads), Key(3, step), NUMEL, offset=rank * stride
            )
            expected[3 * BLOCK : 3 * BLOCK + 640].view(10, 64)[7] = 0
            assert same_bits(found, expected)


def keep_apart(rank: int, world_size: int) -> None:
    """Exact segments have the bits of an exact exchange; float64 and a mean use other routes."""
    communicator = rhtcomm.TorchCommunicator()
    reducer = Reducer(CODEC, communicator, min_numel=0)
    flat, output = spread(rank, world_size).view(-1), torch.empty(NUMEL)
    treatment = Treatment(CODEC, (False, True, True), compare=True)
    report = reducer.scatter_(output, flat, Key(3), lengths=LENGTHS, rows=ROWS, treatment=treatment)
    plain = torch.empty(NUMEL)
    reducer.scatter_(plain, flat, Key(3), treatment=Treatment(None))
    assert same_bits(output[3 * BLOCK :], plain[3 * BLOCK :])
    assert 0.01 < (output - plain)[: 3 * BLOCK].norm() / plain[: 3 * BLOCK].norm() < 0.2
    assert report.rotations == 2
    exact = torch.empty(NUMEL, dtype=torch.float64)
    reducer.scatter_(exact, flat.double(), Key(3))
    total = torch.stack([spread(i, world_size)[rank] for i in range(world_size)]).double()
    torch.testing.assert_close(exact, total.mean(0), rtol=1e-15, atol=1e-15)
    mean = flat.clone()
    reducer.mean_(mean, Key(4))
    shard = mean.view(world_size, NUMEL)[rank]
    assert 0.01 < (shard - plain).norm() / plain.norm() < 0.2


def test_exclusions_float64_and_means_have_routes_of_their_own(ranks: Ranks) -> None:
    ranks.run(keep_apart, 3)


def take_what_all_want(rank: int, world_size: int) -> list[int | None]:
    reducer = Reducer(Codec(QuicFL(4), "auto"), rhtcomm.TorchCommunicator(), min_numel=0)
    taken = []
    for step in range(3):
        flat = torch.randn(4 * 4096, generator=torch.Generator().manual_seed(rank))
        if step == 1 and rank == 1:
            flat[:4096] = 0
            flat[0] = 100  # in the shard of rank 0
        taken.append(reducer.scatter_(torch.empty(2 * 4096), flat, Key(0, step)).rotations)
    return taken


def test_all_ranks_take_as_many_rotations_as_any_wanted_before(ranks: Ranks) -> None:
    assert ranks.run(take_what_all_want, 2) == [[2, 1, 2]] * 2
