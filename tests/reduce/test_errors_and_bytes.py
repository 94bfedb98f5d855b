"""Errors and bytes of an all_reduce against theory, and what its report says."""

import math
from itertools import groupby
from typing import Any
from unittest import mock

import pytest
import torch
from harness import Ranks
from simulation import ALGORITHMS, BLOCK, CODEC, KEY, data

import rhtcomm
from rhtcomm import Codec, Eden, QuicFL
from rhtcomm.reduce import Algorithm
from rhtcomm.reduce.clock import Clock

QUANTIZERS = (QuicFL, Eden)


# By quadrature over N(0, 1): vNMSE, and kurtosis of a coordinate's error. That of QUIC-FL is large
# because its outermost levels lie far outside, at 79 sigma for two bits.
ERRORS = {
    ("QuicFL", 2): (0.24583, 303),
    ("QuicFL", 4): (0.011587, 150),
    ("Eden", 2): (0.133121, 3.4),
    ("Eden", 4): (0.009592, 10.8),
}


def gaussian(rank: int, numel: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(rank)
    return (1 + rank) * torch.randn(numel, generator=random)


def reduce_gaussian(
    rank: int, world_size: int, codecs: list[Codec], numel: int
) -> dict[tuple[int, Algorithm], torch.Tensor]:
    results = {}
    for index, codec in enumerate(codecs):
        for algorithm in ALGORITHMS:
            x = gaussian(rank, numel)
            rhtcomm.all_reduce(x, codec, KEY, rhtcomm.TorchCommunicator(), algorithm=algorithm)
            results[index, algorithm] = x
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_error_of_the_mean_is_that_of_the_theory(world_size: int, ranks: Ranks) -> None:
    numel = 1 << 18
    codecs = [Codec(quantizer(bits)) for quantizer in QUANTIZERS for bits in (2, 4)]
    (results, *_) = ranks.run(reduce_gaussian, world_size, codecs, numel)
    inputs = torch.stack([gaussian(rank, numel) for rank in range(world_size)]).double()
    exact = inputs.mean(0)
    for (index, algorithm), mean in results.items():
        quantizer = codecs[index].quantizer
        e, kurtosis = ERRORS[type(quantizer).__name__, quantizer.bits]
        # Independent errors e |x_i|^2 in the first hop; the second one encodes mean and error.
        expected = e * inputs.square().sum() / world_size**2
        if algorithm != "all_gather":
            expected += e * (exact.square().sum() + expected)
        # The sum of numel independent squares deviates by (kurtosis / numel)^(1/2) of itself: four
        # times that, and 1% for nodes, finite blocks and the dither that the ranks share.
        ratio = ((mean - exact).square().sum() / expected).item()
        tolerance = 0.01 + 4 * math.sqrt(kurtosis / numel)
        assert ratio == pytest.approx(1, abs=tolerance), f"{quantizer} {algorithm}"


def count_bytes(rank: int, world_size: int, numel: int) -> list[int]:
    sent = []
    for algorithm, min_numel in [*((known, 0) for known in ALGORITHMS), ("auto", numel + 1)]:
        communicator = rhtcomm.TorchCommunicator()
        rhtcomm.all_reduce(
            data(rank, numel),
            CODEC,
            KEY,
            communicator,
            algorithm=algorithm,  # type: ignore[arg-type]
            min_numel=min_numel,
            check=False,
        )
        sent.append(communicator.bytes_sent)
    return sent


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_sent(world_size: int, ranks: Ranks) -> None:
    numel = 400 * BLOCK
    payload = CODEC.nbytes(numel)
    assert payload == pytest.approx(numel / 2, rel=0.04), "not the 4 bits per coordinate"
    ring = 2 * (world_size - 1) / world_size
    for rank, sent in enumerate(ranks.run(count_bytes, world_size, numel)):
        star = payload if rank else (world_size - 1) * payload
        expected = [(world_size - 1) * payload, ring * payload, star, ring * 4 * numel]
        assert sent == [pytest.approx(count, rel=0.01) for count in expected]


def time_parts(rank: int, world_size: int) -> list[list[str]]:
    parts = []
    for algorithm, min_numel in [*((known, 0) for known in ALGORITHMS), ("auto", 1 << 20)]:
        told: list[str | None] = []
        begin = Clock.to

        def to(clock: Clock, part: Any, told: list[str | None] = told, begin: Any = begin) -> None:
            told.append(part)
            begin(clock, part)

        with mock.patch.object(Clock, "to", to):
            report = rhtcomm.all_reduce(
                data(rank, 5120),
                CODEC,
                KEY,
                rhtcomm.TorchCommunicator(),
                algorithm=algorithm,  # type: ignore[arg-type]
                min_numel=min_numel,
            )
        parts.append([part for part, _ in groupby(filter(None, told))])
        assert report.exchange_seconds > 0
        for part, seconds in (("encode", report.encode_seconds), ("decode", report.decode_seconds)):
            assert (seconds > 0) == (part in told)
    return parts


def test_the_clock_is_told_every_part(ranks: Ranks) -> None:
    round_trip = ["encode", "exchange", "decode"]
    assert ranks.run(time_parts, 2) == [
        # Whatever comes at the end, each rank waits there until the others have what it sent.
        [*([*parts, "exchange"] for parts in (round_trip, 2 * round_trip, by_gather)), ["exchange"]]
        for by_gather in (2 * round_trip, round_trip)
    ]
