"""`quantizer="ecdq"` in the hook: fractional bits, error feedback, checkpoints, policies."""

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness import Ranks
from models import all_equal, gradients_of, mlp, parameters_of, task_loss, train
from problems import nmse, numbers
from states import TIMEOUT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import ECDQ
from rhtcomm.hooks import RHTState, register

OPTIONS: dict[str, Any] = {
    **{"quantizer": "ecdq", "block": 256, "min_numel": 0, "warmup_steps": 0, "timeout": TIMEOUT},
}


def start() -> tuple[nn.Module, DistributedDataParallel]:
    """A model whose buckets are those of all later steps."""
    torch.manual_seed(0)
    model = mlp(32, 64, 64, 8)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
    task_loss(ddp, numbers(0, 0, shape=(16, 32))).backward()
    for p in model.parameters():
        p.grad = None
    return model, ddp


def mean_of_gradients(rank: int, world_size: int, bits: Any, algorithm: str) -> dict[str, Any]:
    model, ddp = start()
    with register(ddp, bits=bits, algorithm=algorithm, **OPTIONS) as handle:
        task_loss(ddp, numbers(rank, 1, shape=(16, 32))).backward()
        found, stats = gradients_of(model), handle.stats()
    own = []
    for other in range(world_size):
        torch.manual_seed(0)
        plain = mlp(32, 64, 64, 8)
        task_loss(plain, numbers(other, 1, shape=(16, 32))).backward()
        own.append(gradients_of(plain))
    exact = torch.stack(own).mean(dim=0)
    return {"found": found, "nmse": nmse(found, exact), "sent": stats.bytes_sent}


@pytest.mark.parametrize("algorithm", ["all_gather", "two_shot", "gather"])
def test_gradients_are_averaged(algorithm: str, ranks: Ranks) -> None:
    sent = []
    for bits in (2, 2.5, 4.0):
        results = ranks.run(mean_of_gradients, 3, bits, algorithm)
        assert all_equal([result["found"] for result in results])
        vnmse = ECDQ(bits).vnmse  # of each rank and hop, where ranks' gradients differ
        assert vnmse / 12 < results[0]["nmse"] < 4 * vnmse
        sent.append(results[0]["sent"])
    assert sent[0] < sent[1] < sent[2]


def train_and_resume(rank: int, world_size: int, error_feedback: bool) -> dict[str, torch.Tensor]:
    """Four steps at once; and two, a checkpoint, and two more in new objects."""

    def begin() -> tuple[nn.Module, Any, RHTState]:
        model, ddp = start()
        handle = register(ddp, bits=1.75, error_feedback=error_feedback, seed=9, **OPTIONS)
        return model, ddp, handle

    model, ddp, handle = begin()
    file = io.BytesIO()
    train(model, ddp, rank, range(0, 2))
    torch.save({"model": model.state_dict(), "hook": handle.state_dict()}, file)
    train(model, ddp, rank, range(2, 4))
    whole = parameters_of(model)
    handle.close()
    file.seek(0)
    checkpoint = torch.load(file)
    model, ddp, handle = begin()
    model.load_state_dict(checkpoint["model"])
    handle.load_state_dict(checkpoint["hook"])
    train(model, ddp, rank, range(2, 4))
    handle.close()
    return {"whole": whole, "resumed": parameters_of(model)}


@pytest.mark.parametrize("error_feedback", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(error_feedback: bool, ranks: Ranks) -> None:
    results = ranks.run(train_and_resume, 2, error_feedback)
    assert all_equal([result["whole"] for result in results])
    for result in results:
        assert torch.equal(result["resumed"], result["whole"])


def by_shape(parameters: Sequence[torch.Tensor]) -> float:
    return 4 if any(p.shape[0] == 8 for p in parameters) else 1.25


def test_bits_by_bucket_may_be_fractions(ranks: Ranks) -> None:
    results = ranks.run(mean_of_gradients, 2, by_shape, "all_gather")
    assert all_equal([result["found"] for result in results])
    assert results[0]["nmse"] < 2 * ECDQ(1.25).vnmse


def test_arguments() -> None:
    assert RHTState(2.5, quantizer="ecdq").codec.quantizer == ECDQ(2.5)
    with pytest.raises(ValueError, match=r"ECDQ: bits=2\.6"):
        RHTState(2.6, quantizer="ecdq")
    with pytest.raises(ValueError, match=r"QuicFL: bits=2\.5"):
        RHTState(2.5)
    with pytest.raises(ValueError, match="can diverge"):
        RHTState(1, quantizer="ecdq", error_feedback=True)
    RHTState(1.25, quantizer="ecdq", error_feedback=True)
    with pytest.raises(ValueError, match="is only for quantizer='quic_fl'"):
        RHTState(4, quantizer="ecdq", exact_fraction=1 / 512)
