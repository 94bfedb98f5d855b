"""ECDQ in the collectives: the bits of their simulation on every rank, the bytes of the formula."""

import pytest
import torch
from groups import two_levels
from harness import Ranks
from simulation import BLOCK, KEY, Case, chunks_of, data, reduce_cases, same_bits, simulated

import rhtcomm
from rhtcomm import ECDQ, Codec, DisagreementError
from rhtcomm.reduce import split

ALGORITHMS = ("all_gather", "two_shot", "gather", "auto")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_gets_the_bits_of_the_simulation(world_size: int, ranks: Ranks) -> None:
    cases: list[Case] = [
        (Codec(ECDQ(bits), block=BLOCK), algorithm, 10 * BLOCK + 77, dtype)
        for algorithm in ALGORITHMS
        for bits, dtype in ((1, torch.bfloat16), (2.75, torch.float32))
    ]
    # Around the number of ranks, whole blocks, and units of 16 blocks of 4096.
    cases += [
        (Codec(ECDQ(2), block=BLOCK), "two_shot", numel, torch.float32)
        for numel in (1, 2 * BLOCK, 4 * BLOCK - 1, 12 * BLOCK)
    ]
    cases.append((Codec(ECDQ(4)), "two_shot", (1 << 17) + 5000, torch.float16))
    by_rank = ranks.run(reduce_cases, world_size, cases)
    for case, *results in zip(cases, *by_rank, strict=True):
        codec, algorithm, numel, dtype = case
        inputs = [data(rank, numel, dtype) for rank in range(world_size)]
        expected = simulated(inputs, codec, KEY, algorithm)
        for rank, result in enumerate(results):
            assert same_bits(result, expected), f"{case} on rank {rank}"


def reduce_in_chunks(rank: int, world_size: int, algorithm: str) -> tuple[torch.Tensor, int]:
    communicator, codec = rhtcomm.TorchCommunicator(), Codec(ECDQ(2.5), block=BLOCK)
    x = data(rank, 30 * BLOCK + 77)
    with chunks_of(8):
        report = rhtcomm.all_reduce(
            x, codec, KEY, communicator, algorithm=algorithm, min_numel=0, check=False
        )
    return x, report.bytes_sent


@pytest.mark.parametrize("algorithm", ["all_gather", "two_shot"])
def test_chunks_are_units_of_their_own(algorithm: str, ranks: Ranks) -> None:
    world_size, codec, numel = 3, Codec(ECDQ(2.5), block=BLOCK), 30 * BLOCK + 77
    results = ranks.run(reduce_in_chunks, world_size, algorithm)
    inputs = [data(rank, numel) for rank in range(world_size)]
    expected = simulated(inputs, codec, KEY, algorithm)  # type: ignore[arg-type]
    with chunks_of(8):
        shards = 1 if algorithm == "all_gather" else world_size
        chunks = split.split_into_chunks(numel, BLOCK, shards)
    assert len(chunks) > 1
    for found, _ in results:
        # Codes do not depend on how a tensor is cut, as long as the first step fits.
        assert same_bits(found, expected)
    if algorithm == "all_gather":
        of_payloads = sum(codec.nbytes(chunk.stop - chunk.start) for chunk in chunks)
        assert results[0][1] == (world_size - 1) * of_payloads


def reduce_on_two_levels(rank: int, world_size: int) -> torch.Tensor:
    communicator = two_levels(rank, 2, 2)
    x = data(rank, 10 * BLOCK)
    rhtcomm.all_reduce(x, Codec(ECDQ(3), block=BLOCK), KEY, communicator, min_numel=0)
    return x


def test_two_levels(ranks: Ranks) -> None:
    results = ranks.run(reduce_on_two_levels, 4)
    inputs = [data(rank, 10 * BLOCK) for rank in range(4)]
    nodes = [(inputs[0] + inputs[1]) / 2, (inputs[2] + inputs[3]) / 2]
    expected = simulated(nodes, Codec(ECDQ(3), block=BLOCK), KEY, "all_gather")
    assert all(same_bits(result, expected) for result in results)


def disagree(rank: int, world_size: int) -> str:
    codec = Codec(ECDQ(2.5 if rank else 2.75), block=BLOCK)
    with pytest.raises(DisagreementError) as caught:
        rhtcomm.all_reduce(data(rank, 5000), codec, KEY, rhtcomm.TorchCommunicator(), min_numel=0)
    return str(caught.value)


def test_ranks_with_other_bits_find_out(ranks: Ranks) -> None:
    for message in ranks.run(disagree, 2):
        assert "bits" in message
        assert "2.75" in message
