"""What a bucket may hold."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from models import error_of_mean, wrapped
from problems import nmse, numbers
from states import BLOCK, FINE, TIMEOUT, TOLERANCE, logged, submit
from torch import nn

import rhtcomm
from rhtcomm import TorchCommunicator
from rhtcomm.hooks import RHTState

# ---- float64 ----------------------------------------------------------------------------------


class Precise(nn.Module):
    """A float64 scale in a model of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 256)
        self.scale = nn.Parameter(torch.ones(256, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x) * self.scale
        return result


def train_in_two_precisions(
    rank: int, world_size: int, options: dict[str, Any]
) -> tuple[list[float], bool, list[str]]:
    """Errors of both gradients, whether the float64 one is exact to the bit, and the log."""
    torch.manual_seed(0)
    model = Precise()
    with (
        logged() as lines,
        RHTState(8, block=BLOCK, min_numel=0, timeout=TIMEOUT, **options) as state,
    ):
        ddp = wrapped(model, state)
        for step in range(3):
            plain = copy.deepcopy(model)
            x = numbers(rank, step, shape=(16, 64))
            for net in (plain, ddp):
                net.zero_grad()
                net(x).square().mean().backward()
        errors = [
            error_of_mean(mine.grad.float(), own.grad.float())
            for mine, own in zip(model.parameters(), plain.parameters(), strict=True)
        ]
        of_ranks = [torch.empty_like(plain.scale.grad) for _ in range(world_size)]
        dist.all_gather(of_ranks, plain.scale.grad)
        exact = torch.equal(model.scale.grad, sum(of_ranks) / world_size)  # in their order
        assert state.stats().nmse is None or state.stats().nmse < 1e-3
    return errors, exact, lines


@pytest.mark.parametrize(
    "options",
    [{}, {"quantizer": "eden", "error_feedback": True}, {"nmse_every": 1, "quantizer": "lattice"}],
    ids=["plain", "error feedback", "lattice"],
)
def test_float64_travels_exactly(options: dict[str, Any], ranks: Ranks) -> None:
    """And the log says so once."""
    for errors, exact, lines in ranks.run(train_in_two_precisions, 3, options):
        assert max(errors) < 1e-3
        assert exact
        assert len(lines) == 1
        assert "float64 are sent uncompressed" in lines[0]


# ---- Others -----------------------------------------------------------------------------------


def reduce_complex_numbers(rank: int, world_size: int, dtype: torch.dtype) -> float:
    """As torch before 2.13 hands them over: in a bucket of their own dtype."""

    def of(rank: int) -> torch.Tensor:
        return torch.view_as_complex(numbers(rank, shape=(1000, 2))).to(dtype)

    buffer = of(rank)
    with RHTState(**FINE, timeout=TIMEOUT) as state:
        found = submit(state, buffer).wait()
    assert found.data_ptr() == buffer.data_ptr()
    assert found.dtype == dtype
    exact = torch.stack([of(r) for r in range(world_size)]).mean(0)
    return nmse(torch.view_as_real(found), torch.view_as_real(exact))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_buckets_of_complex_numbers(dtype: torch.dtype, ranks: Ranks) -> None:
    for found in ranks.run(reduce_complex_numbers, 2, dtype):
        assert found < (TOLERANCE if dtype == torch.complex64 else 1e-30)


def reduce_integers(rank: int, world_size: int) -> str:
    with RHTState(timeout=TIMEOUT) as state, pytest.raises(TypeError) as caught:
        submit(state, torch.arange(10))
    return str(caught.value)


def test_integers_are_refused(ranks: Ranks) -> None:
    for message in ranks.run(reduce_integers, 2):
        assert (
            "bucket 0 is torch.int64, but only floating-point gradients can be averaged" in message
        )


def follow_a_default_device(rank: int, world_size: int) -> None:
    """What torch makes by default lies elsewhere, but gradients, messages and tables do not."""
    torch.set_default_device("meta")
    try:
        x = numbers_on_cpu(rank)
        with RHTState(**FINE, algorithm="two_shot", timeout=TIMEOUT) as state:
            found = submit(state, x.clone()).wait()
            communicator = TorchCommunicator()
            rhtcomm.all_reduce(x, state.codec, rhtcomm.Key(0), communicator)
    finally:
        torch.set_default_device(None)
    exact = sum(numbers_on_cpu(r) for r in range(world_size)) / world_size
    assert nmse(found, exact) < TOLERANCE  # type: ignore[arg-type]
    assert nmse(x, exact) < TOLERANCE  # type: ignore[arg-type]


def numbers_on_cpu(rank: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(rank)
    return torch.randn(3000, generator=generator, device="cpu")


def test_a_default_device_changes_nothing(ranks: Ranks) -> None:
    ranks.run(follow_a_default_device, 3)
