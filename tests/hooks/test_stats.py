"""What a state counts."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Ranks
from models import Probe, gradients_of, wrapped
from problems import numbers
from states import FINE, TIMEOUT

from rhtcomm import Codec, QuicFL
from rhtcomm.hooks import RHTState
from rhtcomm.hooks.stats import Stats, Totals, figures
from rhtcomm.reduce import Report


def count(rank: int, world_size: int, algorithm: Any, nmse_every: int) -> list[Any]:
    """Stats after each of four steps of a large bucket and a small one that is not compressed."""
    numels = (1 << 18, 100)
    options = {"algorithm": algorithm, "min_numel": 1000, "nmse_every": nmse_every}
    with RHTState(4, warmup_steps=0, **options, timeout=TIMEOUT) as state:
        ddp = wrapped(Probe(*numels), state, bucket_cap_mb=0.0001, find_unused_parameters=True)
        stats = [state.stats()]
        for step in range(4):
            ddp(*(numbers(rank, step, i, shape=(n,)) for i, n in enumerate(numels))).backward()
            ddp.zero_grad()
            stats.append(state.stats())
        return stats


@pytest.mark.parametrize(("algorithm", "world_size"), [("all_gather", 2), ("two_shot", 4)])
@pytest.mark.parametrize("nmse_every", [0, 3])
def test_stats(algorithm: str, world_size: int, nmse_every: int, ranks: Ranks) -> None:
    ring = 2 * (world_size - 1) / world_size
    payload = Codec(QuicFL(4)).nbytes(1 << 18)
    hops = world_size - 1 if algorithm == "all_gather" else ring
    sent = hops * payload + ring * 4 * 100
    uncompressed = ring * 4 * ((1 << 18) + 100)
    for stats in ranks.run(count, world_size, algorithm, nmse_every):
        for step, now in enumerate(stats):
            assert now.steps == step
            assert now.bytes_sent == pytest.approx(step * sent, rel=1e-3)
            assert now.bytes_uncompressed == pytest.approx(step * uncompressed, rel=1e-3)
            assert now.bytes_saved == now.bytes_uncompressed - now.bytes_sent
            ratio = uncompressed / sent if step else 1.0
            assert now.compression_ratio == pytest.approx(ratio, rel=1e-2)
            for seconds in (now.encode_seconds, now.exchange_seconds, now.decode_seconds):
                assert (seconds > 0) == (step > 0)
            if not (nmse_every and step):
                assert now.nmse is None
        if nmse_every:
            # Independent gradients: |mean|^2 = |x|^2 / n, so the error of the mean is e.
            e = 0.011587
            expected = e if algorithm == "all_gather" else e + e * (1 + e)
            # Steps 0 and 3 are sampled. A coordinate's squared error has a kurtosis of 150.
            tolerance = 0.01 + 4 * math.sqrt(150 / (2 << 18))
            assert stats[4].nmse == pytest.approx(expected, rel=tolerance)
            assert stats[1].nmse == stats[2].nmse == stats[3].nmse != stats[4].nmse


def stats_of(steps: int, octets: int, seconds: tuple[float, ...], **others: Any) -> Stats:
    """With four times the bytes uncompressed, and these seconds to encode, exchange and decode."""
    return Stats(steps, octets, 4 * octets, *seconds, **{"rotations": {}, **others})


def test_figures_are_means_over_the_steps_between() -> None:
    before = stats_of(2, 1000, (1.0, 2.0, 4.0))
    after = stats_of(6, 1400, (2.0, 2.5, 4.2), squared_error=0.01, squared_norm=1.0)
    expected = {
        "rhtcomm/bytes_sent": 100,
        "rhtcomm/compression_ratio": 4,
        "rhtcomm/encode_seconds": 0.25,
        "rhtcomm/exchange_seconds": 0.125,
        "rhtcomm/decode_seconds": pytest.approx(0.05),
        "rhtcomm/nmse": 0.01,
    }
    assert figures(before, after) == expected
    assert figures(after, after) == {}
    waited = replace(after, steps=10, exposed_seconds=0.5, waits={0: 3, 64: 1})
    assert figures(after, waited)["rhtcomm/exposed_seconds"] == 0.125


def test_stats_subtract() -> None:
    totals = Totals(10, 40, 1.0, 2.0, 3.0, 4.0, 8.0)
    totals.rotations[2] = 5
    for wait in (0.0, 0.9e-6, 1e-6, 63e-6, 64e-6):
        totals.add_wait(wait)
    earlier = totals.stats(2)
    assert earlier.waits == {0: 1, 1: 1, 2: 1, 64: 1, 128: 1}
    assert earlier.exposed_seconds == pytest.approx(128.9e-6)
    for wait in (0.0, 0.0, 0.75):
        totals.add_wait(wait)
    totals.add_error(2.0, 32.0)
    totals.add(Report(1, 8, 2, None, 0.5, 0.25, 0.125))
    later = totals.stats(3)
    between = later - earlier
    assert between == Stats(
        steps=1,
        bytes_sent=1,
        bytes_uncompressed=8,
        encode_seconds=0.5,
        exchange_seconds=0.25,
        decode_seconds=0.125,
        rotations={1: 0, 2: 1, 3: 0},
        squared_error=2.0,
        squared_norm=32.0,
        exposed_seconds=pytest.approx(0.75),
        waits={0: 2, 1 << 20: 1},
    )
    assert (between.compression_ratio, between.nmse, between.bytes_saved) == (8, 1 / 16, 7)
    nothing = later - later
    assert (nothing.steps, nothing.nmse, nothing.exposed_seconds, nothing.waits) == (
        0,
        None,
        None,
        {},
    )


def train_alone(rank: int, world_size: int) -> Any:
    with RHTState(**FINE, timeout=TIMEOUT) as state:
        gradient = numbers(rank, shape=(1000,))
        model = Probe(1000)
        ddp = wrapped(model, state)
        ddp(gradient).backward()
        assert torch.equal(gradients_of(model), gradient)
        return state.stats()


def test_one_rank_alone(ranks: Ranks) -> None:
    (stats,) = ranks.run(train_alone, 1)
    assert (stats.steps, stats.bytes_sent, stats.compression_ratio) == (1, 0, 1.0)
