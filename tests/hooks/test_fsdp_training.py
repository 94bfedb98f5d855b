"""Training of sharded models: next to uncompressed training, with late ranks, under a scaler."""

import copy
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Ranks
from models import all_equal, mlp, task_loss
from problems import numbers
from sharded import FINE, probe, sharded, whole
from torch import nn

from rhtcomm.communicators.sockets import SocketCommunicator
from rhtcomm.hooks import compress_fsdp


def parameters_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters()])


def train_with_jitter(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """50 steps without compression, and 50 with it and with ranks that are late at random."""
    delays = random.Random(rank)
    torch.manual_seed(0)
    start = mlp(32, 64, 32, 8)

    def wait(milliseconds: float) -> None:
        time.sleep(delays.random() * milliseconds / 1000)

    def mean_loss(model: nn.Module) -> float:
        batches = [(other, step) for other in range(world_size) for step in range(10)]
        with torch.no_grad():
            losses = [task_loss(model, numbers(*batch, shape=(16, 32))) for batch in batches]
        return torch.stack(losses).mean().item()

    def train(model: nn.Module, milliseconds: float) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(50):
            wait(milliseconds)
            task_loss(model, numbers(rank, step % 10, shape=(16, 32))).backward()
            wait(milliseconds)
            optimizer.step()
            optimizer.zero_grad()
        return mean_loss(model)

    def late_start(communicator: SocketCommunicator, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        wait(2)
        return exchange(communicator, x)

    result = {"before": mean_loss(start), "uncompressed": train(sharded(copy.deepcopy(start)), 0)}
    model, exchange = sharded(copy.deepcopy(start)), SocketCommunicator.start_all_to_all
    with (
        pytest.MonkeyPatch.context() as patch,
        compress_fsdp(model, **(FINE | options)) as handle,
    ):
        patch.setattr(SocketCommunicator, "start_all_to_all", late_start)
        result["compressed"] = train(model, 4)
        return result | {"parameters": parameters_of(model), "stats": handle.stats()}


@pytest.mark.parametrize(
    ("world_size", "quantizer"),
    [(2, "quic_fl"), (4, "quic_fl"), (2, "ecdq"), (2, "eden"), (2, "vector")],
)
def test_training_with_late_ranks(world_size: int, quantizer: str, ranks: Ranks) -> None:
    results = ranks.run(train_with_jitter, world_size, {"bits": 4, "quantizer": quantizer})
    assert all_equal([result["parameters"] for result in results])
    for result in results:
        gain = result["before"] - result["uncompressed"]
        assert gain > 0.5 * result["before"], "the uncompressed run did not learn"
        assert result["compressed"] == pytest.approx(result["uncompressed"], abs=0.05 * gain)
        assert result["stats"].steps == 50
        assert result["stats"].compression_ratio > 2.5, "nothing was compressed"


def train_with_scaler(rank: int, world_size: int) -> tuple[list[torch.Tensor], list[float]]:
    """Five steps; in the third, one element of one rank is infinite, in another rank's shard."""
    model = probe(3000, 500)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameters, scales = [parameters_of(model)], []
    with compress_fsdp(model, **FINE):
        for step in range(5):
            gradients = numbers(rank, step, shape=(3500,))
            if (rank, step) == (1, 2):
                gradients[12] = torch.inf
            scaler.scale(model(*gradients.split([3000, 500]))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            parameters.append(parameters_of(model))
            scales.append(scaler.get_scale())
    return parameters, scales


def test_an_infinite_gradient_makes_all_ranks_skip_the_step(ranks: Ranks) -> None:
    for parameters, scales in ranks.run(train_with_scaler, 2):
        skipped = [torch.equal(*pair) for pair in itertools.pairwise(parameters)]
        assert skipped == [step == 2 for step in range(5)]
        assert scales == [1024.0] * 2 + [512.0] * 3
