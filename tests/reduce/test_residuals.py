"""Error feedback of all_reduce: what is sent and what is left add up to what there was."""

from typing import Any

import pytest
import torch
from groups import Alone, two_levels
from harness import Ranks
from problems import ROUNDOFF, gaussian, numbers
from states import BLOCK

import rhtcomm
from rhtcomm import ECDQ, Codec, Eden, Key, Lattice, QuicFL, VectorQuantizer
from rhtcomm.reduce import Algorithm

KEY = Key(seed=7, step=3, bucket=1)
CODEC = Codec(Eden(1, biased=True), block=BLOCK)
STEPS = 6
NUMEL = 9 * BLOCK + 77


Case = tuple[Codec, Algorithm, torch.dtype]
CASES: list[Case] = [
    (CODEC, "all_gather", torch.float32),
    (CODEC, "two_shot", torch.float32),
    (CODEC, "gather", torch.float32),
    (CODEC, "all_gather", torch.bfloat16),
    (Codec(QuicFL(2), block=BLOCK), "two_shot", torch.float32),
    (Codec(ECDQ(1.5), block=BLOCK), "all_gather", torch.float32),
    (Codec(ECDQ(3), block=BLOCK), "two_shot", torch.bfloat16),
    (Codec(VectorQuantizer(1, biased=True), block=BLOCK), "all_gather", torch.float32),
]


def gradient(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ((rank + 1) * numbers(rank, step, shape=(NUMEL,))).to(dtype)


def accumulate(rank: int, world_size: int, nodes: int) -> list[list[torch.Tensor]]:
    """Of each case the sum of the results and the residual after all steps, both (NUMEL,)."""
    communicator: Any = rhtcomm.TorchCommunicator()
    if nodes:
        communicator = two_levels(rank, nodes, world_size // nodes)
    outcomes = []
    for codec, algorithm, dtype in CASES:
        total, residual = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL)
        for step in range(STEPS):
            x = gradient(rank, step, dtype)
            rhtcomm.all_reduce(
                x,
                codec,
                Key(1, step),
                communicator,
                algorithm=algorithm,
                min_numel=0,
                check=False,
                residual=residual,
            )
            total += x
        outcomes.append([total, residual])
    return outcomes


@pytest.mark.parametrize(("world_size", "nodes"), [(2, 0), (3, 0), (4, 2)])
def test_sent_and_left_add_up_to_the_exact_means(world_size: int, nodes: int, ranks: Ranks) -> None:
    by_rank = ranks.run(accumulate, world_size, nodes)
    for number, case in enumerate(CASES):
        dtype = case[2]
        inputs = torch.stack(
            [
                torch.stack([gradient(rank, step, dtype).double() for step in range(STEPS)])
                for rank in range(world_size)
            ]
        )
        sent = by_rank[0][number][0]
        left = torch.stack([outcomes[number][1].double() for outcomes in by_rank])
        assert all(torch.equal(outcomes[number][0], sent) for outcomes in by_rank)
        # Each step rounds numbers up to the largest of the inputs and the residuals some dozens of
        # times. What bfloat16 results lose, which have 8 bits, is left as well.
        peak = float(inputs.abs().max() + left.abs().max())
        torch.testing.assert_close(
            sent + left.mean(0), inputs.mean(0).sum(0), rtol=0, atol=STEPS * 64 * ROUNDOFF * peak
        )
        assert float(left.norm()) > 0.1 * float(inputs[:, 0].norm()), "nothing was left unsent"


def meet_infinity(rank: int, world_size: int, algorithm: Algorithm) -> list[torch.Tensor]:
    communicator = rhtcomm.TorchCommunicator()
    residual = gradient(rank, 50)
    x, before = gradient(rank, 0), residual.clone()
    if rank == 1:
        x[2 * BLOCK + 5] = torch.inf
    rhtcomm.all_reduce(
        x, CODEC, KEY, communicator, algorithm=algorithm, min_numel=0, residual=residual
    )
    return [x, before, residual]


@pytest.mark.parametrize("algorithm", ["all_gather", "two_shot", "gather"])
def test_a_step_that_is_not_finite_keeps_the_residual(algorithm: Algorithm, ranks: Ranks) -> None:
    spoilt = torch.zeros(NUMEL, dtype=torch.bool)
    spoilt[2 * BLOCK : 3 * BLOCK] = True
    for mean, before, after in ranks.run(meet_infinity, 3, algorithm):
        assert torch.equal(mean.isnan(), spoilt)
        assert torch.equal(before, after)


def flush(rank: int, world_size: int) -> list[torch.Tensor]:
    x, residual = gradient(rank, 0), gradient(rank, 50)
    rhtcomm.all_reduce(
        x, CODEC, KEY, rhtcomm.TorchCommunicator(), min_numel=NUMEL + 1, residual=residual
    )
    return [x, residual]


def test_small_tensors_take_what_is_left_along(ranks: Ranks) -> None:
    exact = torch.stack([gradient(rank, 0) + gradient(rank, 50) for rank in range(3)]).mean(0)
    for mean, residual in ranks.run(flush, 3):
        torch.testing.assert_close(mean, exact)
        assert not residual.any()


def test_one_rank_alone_is_exact() -> None:
    x, residual = gradient(0, 0), gradient(0, 50)
    expected = x + residual
    rhtcomm.all_reduce(x, CODEC, KEY, Alone(), check=False, residual=residual)
    assert torch.equal(x, expected)
    assert not residual.any()


def hold_still(rank: int, world_size: int, algorithm: Algorithm) -> list[float]:
    """The residuals' norms in units of the gradient's, which stays as it is."""
    communicator = rhtcomm.TorchCommunicator()
    x, residual, norms = gradient(rank, 0), torch.zeros(NUMEL), []
    for step in range(40):
        rhtcomm.all_reduce(
            x.clone(),
            CODEC,
            Key(2, step),
            communicator,
            algorithm=algorithm,
            min_numel=0,
            check=False,
            residual=residual,
        )
        norms.append(float(residual.norm() / x.norm()))
    return norms


def test_residuals_stay_bounded(ranks: Ranks) -> None:
    """|r| <= a (|x| + |r|), a = 0.3634^(1/2) up to the spread between blocks of 256.

    Part of r is what x shrinks by, 0.3634 / (1 - 0.3634) of it, so that |x + r| > 1.5 |x|.
    """
    for norms in ranks.run(hold_still, 2, "all_gather"):
        assert 0.8 < max(norms) < 0.64 / (1 - 0.64)
    # What a rank owns holds the second hop's error too, as many times as there are ranks.
    for norms in ranks.run(hold_still, 3, "two_shot"):
        assert max(norms[20:]) < 1.5 * max(norms[:20])


# ---- Training ---------------------------------------------------------------------------------


def minimize(rank: int, world_size: int, feedback: bool) -> float:
    """The squared distance from the minimum of the mean of |w - target|^2 / 2, after 200 steps."""
    spike = torch.zeros(BLOCK)
    spike[3] = 3
    noise = gaussian(BLOCK) / 4
    targets = torch.stack([spike + noise, -spike, -noise])
    codec = Codec(Eden(1, biased=True), rotations=1, block=BLOCK)
    w, residual = gaussian(BLOCK, 1), torch.zeros(BLOCK) if feedback else None
    communicator = rhtcomm.TorchCommunicator()
    for step in range(200):
        g = w - targets[rank]
        rhtcomm.all_reduce(
            g, codec, Key(3, step), communicator, min_numel=0, check=False, residual=residual
        )
        w -= 2 / (step + 10) * g
    return float((w - targets.mean(0)).square().sum())


def test_sgd_needs_feedback_to_reach_the_minimum(ranks: Ranks) -> None:
    """One transform turns a spike into numbers that one bit a coordinate holds exactly, so the
    ranks' gradients shrink differently and cancel in the wrong place."""
    without, fed_back = (ranks.run(minimize, 3, feedback)[0] for feedback in (False, True))
    assert without > 0.05
    assert fed_back < 0.01 * without


# ---- Wrong use --------------------------------------------------------------------------------


def bring_odd_residuals(rank: int, world_size: int) -> list[str]:
    messages = []
    for odd in (None, torch.zeros(999), torch.zeros(1000, dtype=torch.float64)):
        residual = odd if rank == 1 else torch.zeros(1000)
        with pytest.raises(rhtcomm.DisagreementError) as error:
            rhtcomm.all_reduce(
                torch.ones(1000), CODEC, KEY, rhtcomm.TorchCommunicator(), residual=residual
            )
        messages.append(str(error.value))
    return messages


def test_one_odd_residual_is_named_on_every_rank(ranks: Ranks) -> None:
    first, second = ranks.run(bring_odd_residuals, 2)
    assert first == second
    for message, odd in zip(first, ("None", "(999,)", "float64"), strict=True):
        assert "differently in residual (" in message
        assert odd in message


@pytest.mark.parametrize(
    ("codec", "residual", "message"),
    [
        (Lattice(4), torch.zeros(100), "another quantizer"),
        (Codec(QuicFL(1)), torch.zeros(100), "diverge"),
        (Codec(Eden(1)), torch.zeros(100), "diverge"),
        (CODEC, torch.zeros(99), r"create it with torch.zeros\(\(100,\)"),
        (
            CODEC,
            torch.zeros(100, dtype=torch.float64),
            "residual is torch.float64 .* create it with",
        ),
        (CODEC, torch.zeros(100, device="meta"), "residual is on the meta device"),
    ],
)
def test_what_all_reduce_refuses(codec: Any, residual: torch.Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        rhtcomm.all_reduce(torch.ones(100), codec, KEY, Alone(), check=False, residual=residual)
