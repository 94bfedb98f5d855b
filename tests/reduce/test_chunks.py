"""Chunks of a tensor travel alone, and change no bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Ranks
from simulation import (
    ALGORITHMS,
    BLOCK,
    CODEC,
    KEY,
    Case,
    chunks_of,
    data,
    reduce_cases,
    same_bits,
    simulated,
)

import rhtcomm
from rhtcomm import Codec, Eden, QuicFL
from rhtcomm.reduce import Algorithm, split_into_chunks


def test_chunks_cover_a_tensor_in_order() -> None:
    for numel, block, calls in [(1, 32, 2), (6_553_600, 4096, 3), (2**24 + 77, 4096, 64)]:
        chunks = split_into_chunks(numel, block, calls)
        assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
        assert (chunks[0].start, chunks[-1].stop) == (0, numel)
        for chunk in chunks[:-1]:
            assert (chunk.stop - chunk.start) % (block * calls) == 0, "uneven shards"
    lengths = [len(split_into_chunks(25 << 18, 4096, calls)) for calls in (1, 2, 4, 64)]
    assert lengths == [9, 5, 3, 1]
    assert len(split_into_chunks(1 << 18, 4096, 1)) == 1


def reduce_in_chunks(rank: int, world_size: int, cases: list[Case]) -> list[torch.Tensor]:
    with chunks_of(2):
        return reduce_cases(rank, world_size, cases)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_gather_and_gather_in_chunks_change_no_bit(world_size: int, ranks: Ranks) -> None:
    """A block's randomness depends on its place in the bucket, not on the chunk."""
    cases: list[Case] = [
        (codec, algorithm, numel, torch.float32)
        for codec in (CODEC, Codec(Eden(3), block=BLOCK))
        for algorithm in ("all_gather", "gather")
        for numel in (31 * BLOCK + 77, 24 * BLOCK + 1, BLOCK)
    ]
    by_rank = ranks.run(reduce_in_chunks, world_size, cases)
    for case, *results in zip(cases, *by_rank, strict=True):
        codec, algorithm, numel, dtype = case
        inputs = [data(rank, numel, dtype) for rank in range(world_size)]
        expected = simulated(inputs, codec, KEY, algorithm)
        for result in results:
            assert same_bits(result, expected), case


def test_two_shot_in_chunks_changes_no_bit(ranks: Ranks) -> None:
    """Another rank may own a block, but what it does with it is the same."""
    case: Case = (CODEC, "two_shot", 31 * BLOCK + 77, torch.float32)
    expected = simulated([data(rank, case[2]) for rank in range(3)], CODEC, KEY, "two_shot")
    for (result,) in ranks.run(reduce_in_chunks, 3, [case]):
        assert same_bits(result, expected)


def want_in_chunks(rank: int, world_size: int) -> list[int | None]:
    """Only one chunk of one rank is too spiky for a single transform."""
    block, wanted = 4 * BLOCK, []  # the bound of Gaussian blocks of 256 exceeds the tolerance
    for algorithm in ALGORITHMS:
        for spike in (0, 17 * block, None):
            x = torch.randn(24 * block, generator=torch.Generator().manual_seed(rank))
            if rank == 1 and spike is not None:
                x[spike : spike + block] = 0
                x[spike] = 100
            with chunks_of(4 if algorithm == "two_shot" else 12):
                wanted.append(
                    rhtcomm.all_reduce(
                        *(x, Codec(QuicFL(4), "auto", block), KEY, rhtcomm.TorchCommunicator()),
                        algorithm=algorithm,
                        min_numel=0,
                    ).wanted_rotations
                )
    return wanted


def test_chunks_want_as_many_rotations_as_the_neediest(ranks: Ranks) -> None:
    assert ranks.run(want_in_chunks, 3) == [[2, 2, 1] * len(ALGORITHMS)] * 3


def log_of_exchanges(rank: int, world_size: int, algorithm: Algorithm) -> list[str]:
    """What is started and waited for, in its order."""
    communicator, log = rhtcomm.TorchCommunicator(), []

    def logged(name: str, start: Callable[[torch.Tensor], Callable[[], Any]]) -> Any:
        def wrapped(x: torch.Tensor) -> Callable[[], Any]:
            log.append(f"start {name}")
            finish = start(x)
            return lambda: log.append(f"finish {name}") or finish()

        return wrapped

    for name in ("all_gather", "all_to_all", "gather", "broadcast"):
        start = getattr(communicator, f"start_{name}")
        setattr(communicator, f"start_{name}", logged(name, start))
    with chunks_of(1 if algorithm == "two_shot" else 2):
        rhtcomm.all_reduce(
            *(data(rank, 6 * BLOCK), CODEC, KEY, communicator),
            **{"algorithm": algorithm, "min_numel": 0, "check": False},  # type: ignore[arg-type]
        )
    return log


def test_chunks_travel_while_others_are_encoded_and_decoded(ranks: Ranks) -> None:
    one_trip = ["start all_gather"] * 3 + ["finish all_gather"] * 3
    assert ranks.run(log_of_exchanges, 2, "all_gather") == [one_trip] * 2
    for algorithm, there, back in [
        ("two_shot", "all_to_all", "all_gather"),
        ("gather", "gather", "broadcast"),
    ]:
        turn = [f"finish {there}", f"start {back}"]
        expected = [f"start {there}"] * 3 + turn * 3 + [f"finish {back}"] * 3
        assert ranks.run(log_of_exchanges, 2, algorithm) == [expected] * 2


def reduce_with_a_broken_chunk(
    rank: int, world_size: int, algorithm: Algorithm
) -> tuple[str, torch.Tensor]:
    """What rank 0 receives in the second of three chunks is damaged; then once more without."""
    communicator, calls = rhtcomm.TorchCommunicator(), 0
    name = {"all_gather": "start_all_gather", "two_shot": "start_all_to_all"}.get(
        algorithm, "start_gather"
    )
    start = getattr(communicator, name)

    def damaged(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        nonlocal calls
        calls += 1
        if rank or calls != 2:
            return start(x)
        finish = start(x)

        def finish_damaged() -> torch.Tensor:
            payloads = finish()
            payloads[1, 9] ^= 1
            return payloads

        return finish_damaged

    setattr(communicator, name, damaged)
    options: Any = {"algorithm": algorithm, "min_numel": 0, "check": False}
    with chunks_of(1 if algorithm == "two_shot" else 3):
        message = ""
        try:
            rhtcomm.all_reduce(data(rank, 9 * BLOCK), CODEC, KEY, communicator, **options)
        except rhtcomm.PayloadError as error:
            message = str(error)
        x = data(rank, 9 * BLOCK)
        rhtcomm.all_reduce(x, CODEC, KEY, communicator, **options)
    return message, x


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_broken_chunk_leaves_no_rank_waiting(algorithm: Algorithm, ranks: Ranks) -> None:
    results = ranks.run(reduce_with_a_broken_chunk, 3, algorithm)
    messages, after = zip(*results, strict=True)
    assert "the payload of rank 1 was made with a configuration other" in messages[0]
    for message in messages[1:]:
        if algorithm == "all_gather":  # to which nobody owes a second payload
            assert message == ""
        else:
            assert "rank 0 could not decode the payloads that it received" in message
    expected = simulated([data(rank, 9 * BLOCK) for rank in range(3)], CODEC, KEY, algorithm)
    for result in after:
        assert same_bits(result, expected)
