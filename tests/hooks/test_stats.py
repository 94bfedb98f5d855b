"""What a state counts."""

import math
from typing import Any

import pytest
import torch
from harness import Ranks
from models import Probe, gradients_of, wrapped
from problems import numbers
from states import FINE, TIMEOUT

from rhtcomm import Codec, QuicFL
from rhtcomm.hooks import RHTState
from rhtcomm.hooks.telemetry import Stats, figures


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


def test_figures_are_means_over_the_steps_between() -> None:
    before = Stats(2, 1000, 4000, 1.0, 2.0, 4.0, None, {})
    after = Stats(6, 1400, 6400, 2.0, 2.5, 4.2, 0.01, {})
    expected = {
        "rhtcomm/bytes_sent": 100,
        "rhtcomm/compression_ratio": 6,
        "rhtcomm/encode_seconds": 0.25,
        "rhtcomm/exchange_seconds": 0.125,
        "rhtcomm/decode_seconds": pytest.approx(0.05),
        "rhtcomm/nmse": 0.01,
    }
    assert figures(before, after) == expected
    assert figures(after, after) == {}


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
