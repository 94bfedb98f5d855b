"""rhtcomm.hooks.compress_fsdp for models in FullyShardedDataParallel (FSDP1), on real ranks."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from models import parameters_of
from sharded import CLOSE, FINE, WIDTHS, loss, net
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from rhtcomm.hooks import compress_fsdp, register

NUMELS = [(m + 1) * n for m, n in itertools.pairwise(WIDTHS)]  # of units


def flat(model: nn.Module, **options: Any) -> FSDP:
    """Each linear layer is a unit."""
    policy = ModuleWrapPolicy({nn.Linear})
    return FSDP(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


def gradients_of(model: FSDP) -> torch.Tensor:
    if model._use_orig_params:
        with FSDP.summon_full_params(model, with_grads=True):
            return torch.cat([p.grad.double().flatten() for p in model.parameters()])  # type: ignore[union-attr]
    found = []
    for parameter, numel in zip(model.parameters(), NUMELS, strict=True):
        assert parameter.grad is not None
        shards = [torch.empty_like(parameter.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, parameter.grad)
        found.append(torch.cat(shards)[:numel].double())
    return torch.cat(found)


def reference(world_size: int, steps: list[int]) -> torch.Tensor:
    """The mean over ranks of the gradients of the sum over steps."""
    model = net()
    for rank in range(world_size):
        for step in steps:
            (loss(model, rank, step) / world_size).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])  # type: ignore[union-attr]


def off(model: FSDP, exact: torch.Tensor) -> float:
    return ((gradients_of(model) - exact).norm() / exact.norm()).item()


def use(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    model = flat(net(), **options)
    found: dict[str, Any] = {"off": []}
    with compress_fsdp(model, **FINE) as handle:
        for step in range(2):
            model.zero_grad()
            loss(model, rank, step).backward()
            found["off"].append(off(model, reference(world_size, [step])))
        model.zero_grad()
        with model.no_sync():
            loss(model, rank, 0).backward()
        loss(model, rank, 1).backward()
        found["accumulated"] = off(model, reference(world_size, [0, 1]))
        found["steps"], found["sent"] = handle.stats().steps, handle.stats().bytes_sent
        handle.remove()
    model.zero_grad()
    loss(model, rank, 2).backward()
    found["removed"] = off(model, reference(world_size, [2]))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_orig_params": True, "sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
        {"mixed_precision": MixedPrecision(reduce_dtype=torch.bfloat16)},
    ],
    ids=["flat", "original parameters", "reduced as bf16"],
)
def test_gradients_are_means(options: dict[str, Any], world_size: int, ranks: Ranks) -> None:
    bf16 = "mixed_precision" in options
    shards = [math.ceil(numel / world_size) for numel in NUMELS]
    for found in ranks.run(use, world_size, options):
        assert max(*found["off"], found["accumulated"]) < CLOSE
        assert min(*found["off"], found["accumulated"]) > 1e-4, "nothing was compressed"
        assert found["removed"] < (5e-3 if bf16 else 1e-6)
        assert found["steps"] == 3
        # 8 bits, and the scales and padding of blocks of 256.
        codes = 3 * (world_size - 1) * sum(shards)
        assert codes <= found["sent"] < 1.2 * codes + 3 * 4 * 256 * world_size


def train(rank: int, world_size: int) -> dict[str, Any]:
    losses, kept = {}, None
    for bits in (None, 4):
        model = flat(net(), use_orig_params=True)
        handle = None if bits is None else compress_fsdp(model, **(FINE | {"bits": bits}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(20):
            optimizer.zero_grad()
            loss(model, rank, step % 4).backward()
            optimizer.step()
        mean = torch.stack([loss(model, rank, i).detach() for i in range(4)])
        mean = mean.mean()
        dist.all_reduce(mean)
        losses[bits] = mean.item()
        if handle is not None:
            handle.close()
            with FSDP.summon_full_params(model):
                kept = parameters_of(model)
    return {"losses": losses, "parameters": kept}


def test_training_ends_where_it_does_uncompressed(ranks: Ranks) -> None:
    first, second = ranks.run(train, 2)
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["losses"][4] == pytest.approx(first["losses"][None], rel=0.02)


def refuse(rank: int, world_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch itself advises against it
        model = flat(net(), sharding_strategy=ShardingStrategy.NO_SHARD)
    with pytest.raises(ValueError, match="for replicas without shards use DistributedDataParallel"):
        compress_fsdp(model)
    model = flat(net())
    with pytest.raises(ValueError, match="and replicate_group, whose hooks work only without"):
        compress_fsdp(model, replicate_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"its names are, for example, 0\._flat_param"):
        compress_fsdp(model, exclude=["0.weight"])
    with pytest.raises(TypeError, match=r"call rhtcomm\.hooks\.compress_fsdp\(model\) instead"):
        register(model)
    with compress_fsdp(model, exclude=["0.*"], **FINE) as handle:
        with pytest.raises(RuntimeError, match="0 already has a communication hook; call remove"):
            compress_fsdp(model)
        loss(model, rank, 0).backward()
        exact = reference(world_size, [0])
        error = (gradients_of(model) - exact).split([NUMELS[0], sum(NUMELS[1:])])
        assert error[0].norm() < 1e-6 * exact.norm()
        assert error[1].norm() > 1e-4 * exact.norm()
        assert handle.stats().steps == 1


def test_what_it_refuses_and_excludes(ranks: Ranks) -> None:
    ranks.run(refuse, 2)
