"""CompressedModelAverager where PeriodicModelAverager fits: in torch's PostLocalSGDOptimizer."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from outer import everything, normed, train
from problems import nmse
from states import BLOCK, TIMEOUT
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from rhtcomm.hooks import CompressedModelAverager

with warnings.catch_warnings():  # of torch.jit.script, which torch itself uses there
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import PostLocalSGDOptimizer

PERIOD, WARMUP = 3, 2


def compressed(**options: Any) -> CompressedModelAverager:
    settings: dict[str, Any] = {"min_numel": 0, "block": BLOCK, "timeout": TIMEOUT, "bits": 8}
    return CompressedModelAverager(PERIOD, WARMUP, **{**settings, **options})


def optimizer_of(model: torch.nn.Module, averager: Any) -> PostLocalSGDOptimizer:
    return PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), averager)


@contextmanager
def bytes_of_reductions() -> Iterator[list[int]]:
    """What is given to dist.all_reduce within it."""
    seen: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(tensor.nbytes)
        return original(tensor, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        yield seen


def post_local(rank: int, world_size: int, kind: str, steps: int) -> dict[str, Any]:
    model = normed()
    averager = compressed() if kind == "compressed" else PeriodicModelAverager(PERIOD, WARMUP)
    optimizer, seen = optimizer_of(model, averager), []
    with bytes_of_reductions() as reduced:
        for step in range(steps):
            train(model, optimizer, rank, step)
            seen.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    outcome: dict[str, Any] = {"seen": seen, "reduced": reduced, "step": averager.step}
    if isinstance(averager, CompressedModelAverager):
        outcome["stats"] = averager.stats()
        averager.close()
    return outcome


def test_it_averages_as_torchs_own_does(ranks: Ranks) -> None:
    steps = 12
    plain = ranks.run(post_local, 2, "plain", steps)
    ours = ranks.run(post_local, 2, "compressed", steps)
    averaged = [step for step in range(steps) if step >= WARMUP and (step - WARMUP) % PERIOD == 0]
    start = torch.cat([p.detach().double().flatten() for p in normed().parameters()])
    for step in range(steps):
        alike = torch.equal(ours[0]["seen"][step], ours[1]["seen"][step])
        assert alike is (step in averaged), step
        for one, other in zip(ours, plain, strict=True):
            moved = nmse(one["seen"][step] - start, other["seen"][step] - start)
            assert moved < (1e-3 if step > averaged[0] else 1e-12)
    # The first average is that of torch; the others are compressed to a fourth.
    assert len(plain[0]["reduced"]) == len(averaged)
    assert ours[0]["reduced"] == plain[0]["reduced"][:1]
    assert ours[0]["stats"].steps == len(averaged) - 1
    assert ours[0]["stats"].compression_ratio == pytest.approx(4, rel=0.05)
    assert ours[0]["step"] == plain[0]["step"] == steps


def resume(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    def go(model: Any, optimizer: Any, steps: range) -> torch.Tensor:
        for step in steps:
            train(model, optimizer, rank, step)
        return everything(model)

    def start() -> tuple[Any, Any, CompressedModelAverager]:
        model, averager = normed(), compressed(bits=2, quantizer="eden", error_feedback=True)
        return model, optimizer_of(model, averager), averager

    model, optimizer, averager = start()
    go(model, optimizer, range(7))
    file = io.BytesIO()
    torch.save([one.state_dict() for one in (model, optimizer, averager)], file)
    outcome = {"whole": go(model, optimizer, range(7, 13))}
    averager.close()
    for name, count in (("resumed", 3), ("without", 2)):
        file.seek(0)
        model, optimizer, averager = start()
        saved = torch.load(file, weights_only=True)
        for one, state in list(zip((model, optimizer, averager), saved, strict=True))[:count]:
            one.load_state_dict(state)
        assert averager.step == 7
        # A second checkpoint before anything was averaged holds the same.
        torch.testing.assert_close(
            averager.state_dict()["outer"], saved[2]["outer"] if count == 3 else None
        )
        outcome[name] = go(model, optimizer, range(7, 13))
        averager.close()
    return outcome


def test_a_resumed_run_ends_with_the_same_bits(ranks: Ranks) -> None:
    for outcome in ranks.run(resume, 2):
        assert torch.equal(outcome["resumed"], outcome["whole"])
        # torch saves the number of steps alone: the first average is uncompressed then.
        assert not torch.equal(outcome["without"], outcome["whole"])


def other_parameters(rank: int, world_size: int) -> list[bool]:
    model, extra = normed(), torch.nn.Linear(64, 64)
    averager, alike = compressed(), []
    optimizer = optimizer_of(model, averager)
    with pytest.raises(RuntimeError, match="nothing has been averaged yet"):
        averager.stats()
    with pytest.raises(ValueError, match="pass what state_dict"):
        averager.load_state_dict({"step": 3})
    for step in range(9):
        if step == 6:
            optimizer.add_param_group({"params": [*extra.parameters()]})
            with torch.no_grad():
                extra.weight += rank  # not the same on all ranks so far
        train(model, optimizer, rank, step)
        both = [torch.empty_like(extra.weight) for _ in range(world_size)]
        dist.all_gather(both, extra.weight.detach())
        alike.append(torch.equal(*both))
    averager.close()
    return alike


def test_new_parameters_are_averaged_as_they_are_first(ranks: Ranks) -> None:
    for alike in ranks.run(other_parameters, 2):
        assert alike[6:] == [False, False, True]
