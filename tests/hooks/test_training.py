"""Training by the hook: next to uncompressed training, with late ranks, under a gradient scaler."""

import copy
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from models import Probe, all_equal, descend, mlp, parameters_of, task_loss, wrapped
from problems import numbers
from states import BLOCK, FINE, TIMEOUT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm.communicators.sockets import SocketCommunicator
from rhtcomm.hooks import RHTState, rht_hook


def train_with_jitter(
    rank: int, world_size: int, algorithm: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """50 steps without the hook, and 50 with it and with ranks that are late at random."""
    delays = random.Random(rank)

    def wait(milliseconds: float) -> None:
        time.sleep(delays.random() * milliseconds / 1000)

    def mean_loss() -> float:
        batches = [(other, step) for other in range(world_size) for step in range(10)]
        with torch.no_grad():
            losses = [task_loss(model, numbers(*batch, shape=(16, 32))) for batch in batches]
        return torch.stack(losses).mean().item()

    def train(ddp: nn.Module, milliseconds: float) -> float:
        for step in range(50):
            wait(milliseconds)
            loss = task_loss(ddp, numbers(rank, step % 10, shape=(16, 32)))
            wait(milliseconds)
            loss.backward()
            descend(ddp, rate=0.5)
        return mean_loss()

    def late_hook(
        state: RHTState,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        wait(1)
        return rht_hook(state, bucket)

    def late(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def late_exchange(self: SocketCommunicator, x: torch.Tensor) -> Any:
            wait(1)
            return exchange(self, x)

        return late_exchange

    torch.manual_seed(0)
    model = mlp(32, 64, 32, 8, bias=False)  # of whole blocks, which takes half the time
    start = copy.deepcopy(model.state_dict())
    result: dict[str, Any] = {"before": mean_loss()}
    result["uncompressed"] = train(DistributedDataParallel(model), milliseconds=0)
    model.load_state_dict(start)
    with (
        pytest.MonkeyPatch.context() as patch,
        RHTState(
            4,
            algorithm=algorithm,
            block=BLOCK,
            min_numel=0,
            warmup_steps=0,
            timeout=TIMEOUT,
            **options,
        ) as state,
    ):
        for exchange in ("start_all_gather", "start_all_to_all"):
            patch.setattr(SocketCommunicator, exchange, late(getattr(SocketCommunicator, exchange)))
        ddp = wrapped(model, state, late_hook, bucket_cap_mb=0.001)
        result["compressed"] = train(ddp, milliseconds=4)
        return result | {"parameters": parameters_of(model), "stats": state.stats()}


QUIC_FL, EDEN, VECTOR = ({"quantizer": name} for name in ("quic_fl", "eden", "vector"))
EXACT = {**QUIC_FL, "exact_fraction": 1 / 512}


@pytest.mark.parametrize(
    ("options", "algorithm", "world_size"),
    [
        *itertools.product((QUIC_FL, EDEN), ("all_gather", "two_shot"), (2, 3, 4)),
        (VECTOR, "all_gather", 2),
        (EXACT, "two_shot", 2),
    ],
)
def test_training_with_late_ranks(
    options: dict[str, Any], algorithm: str, world_size: int, ranks: Ranks
) -> None:
    results = ranks.run(train_with_jitter, world_size, algorithm, options)
    assert all_equal([result["parameters"] for result in results])
    assert bool(results[0]["parameters"].isfinite().all())
    for result in results:
        gain = result["before"] - result["uncompressed"]
        assert gain > 0.5 * result["before"], "the uncompressed run did not learn"
        assert result["compressed"] == pytest.approx(result["uncompressed"], abs=0.05 * gain)
        assert result["stats"].steps == 50
        assert result["stats"].compression_ratio > 3, "nothing was compressed"


# ---- Non-finite gradients ---------------------------------------------------------------------


def train_with_scaler(rank: int, world_size: int, algorithm: Any) -> dict[str, Any]:
    """Five steps under a gradient scaler; in the third, one element of one rank is infinite."""
    with RHTState(**FINE, algorithm=algorithm, nmse_every=1, timeout=TIMEOUT) as state:
        model = Probe(3000, 500)
        ddp = wrapped(model, state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        parameters, scales = [parameters_of(model)], []
        for step in range(5):
            gradients = numbers(rank, step, shape=(3500,))
            if (rank, step) == (1, 2):
                gradients[1234] = torch.inf
            optimizer.zero_grad()
            scaler.scale(ddp(*gradients.split([3000, 500]))).backward()
            scaler.step(optimizer)
            scaler.update()
            parameters.append(parameters_of(model))
            scales.append(scaler.get_scale())
    return {"parameters": parameters, "scales": scales, "nmse": state.stats().nmse}


@pytest.mark.parametrize("algorithm", ["all_gather", "two_shot"])
def test_an_infinite_gradient_makes_all_ranks_skip_the_step(algorithm: str, ranks: Ranks) -> None:
    results = ranks.run(train_with_scaler, 3, algorithm)
    for result in results:
        assert result["scales"] == [1024, 1024, 512, 512, 512]
        moved = [not torch.equal(*pair) for pair in itertools.pairwise(result["parameters"])]
        assert moved == [True, True, False, True, True]
        assert bool(result["parameters"][-1].isfinite().all())
        assert 0 < result["nmse"] < 1e-3, "the step that was skipped spoils the mean error"
    assert all_equal([result["parameters"][-1] for result in results])
