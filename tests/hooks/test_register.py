"""rhtcomm.hooks.register: one line, whatever the model is wrapped in, and what it returns."""

import copy
import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from states import SAVERS, logged
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import rhtcomm
from rhtcomm import HierarchicalCommunicator
from rhtcomm.hooks import RHTState, register, rht_hook

WIDTH = 64
OPTIONS: dict[str, Any] = {"min_numel": 0, "block": 256, "warmup_steps": 0}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8))


def loss(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1000 * rank + step))
    return model(x).square().mean()


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def backward(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    model.zero_grad()
    loss(model, rank, step).backward()
    return gradients(model)


def exact_mean(model: nn.Module, ranks: list[int], step: int) -> torch.Tensor:
    """The mean gradient of a model over ranks, without DDP."""
    plain = net()
    plain.load_state_dict({k.removeprefix("module."): v for k, v in model.state_dict().items()})
    return torch.stack([backward(plain, rank, step) for rank in ranks]).mean(dim=0)


def everywhere(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all ranks of a group hold the same bits."""
    others = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, x, group=group)
    return all(torch.equal(x, other) for other in others)


def halves(rank: int) -> tuple[dist.ProcessGroup, list[int]]:
    groups = {members: dist.new_group(list(members)) for members in ((0, 3), (1, 2))}
    members = next(members for members in groups if rank in members)
    return groups[members], list(members)


def in_wrappers(rank: int, world_size: int, how: str) -> tuple[bool, float, str]:
    """Whether replicas are the same bits, the error of the mean, and the hook's communicator."""
    group, members = None, list(range(world_size))
    options: dict[str, Any] = {}
    if how == "group":
        group, members = halves(rank)
        options = {"process_group": group}
    elif how == "mesh":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "others"))["others"]
        group, members = mesh.get_group(), [rank // 2 * 2, rank // 2 * 2 + 1]
        options = {"device_mesh": mesh}
    ddp = DistributedDataParallel(net(), **options)
    model: nn.Module = ddp
    if how == "compiled":
        model = torch.compile(ddp, backend="eager")  # type: ignore[assignment]
    elif how == "inside":
        model = nn.Sequential(ddp)
    given: dict[str, Any] = {}
    if how == "two levels":
        mesh = init_device_mesh("cpu", (2, 2))
        given = {"communicator": HierarchicalCommunicator.from_mesh(mesh)}
    with register(model, bits=8, **OPTIONS, **given) as handle:
        same, errors = True, []
        for step in range(3):
            found = backward(model, rank, step)
            same &= everywhere(found, group)
            exact = exact_mean(ddp, members, step)
            errors.append(((found - exact).norm() / exact.norm()).item())
        assert handle.stats().steps == 3
        assert handle.stats().compression_ratio > 1.5
        where = handle.state.engine
        assert where is not None
        return same, max(errors), str(where.topology.world_size)


@pytest.mark.parametrize("how", ["plain", "compiled", "inside", "group", "mesh", "two levels"])
def test_replicas_are_the_same_and_the_mean_is_that_of_the_models_own_ranks(
    how: str, ranks: Ranks
) -> None:
    for same, error, world_size in ranks.run(in_wrappers, 4, how):
        assert same
        assert error < 0.02, "the mean of other ranks"
        assert int(world_size) == (2 if how in ("group", "mesh") else 4)


# ---- What it refuses --------------------------------------------------------------------------


def refused(rank: int, world_size: int) -> None:
    ddp = DistributedDataParallel(net())
    with pytest.raises(TypeError, match=r"model=4 must be a model in DistributedDataParallel"):
        register(4)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"this Sequential contains no DistributedDataParallel; wrap"
    ):
        register(net())
    with pytest.raises(ValueError, match=r"holds 2 DistributedDataParallel models"):
        register(nn.ModuleList([ddp, DistributedDataParallel(net())]))
    with pytest.raises(ValueError, match=r"leave out process_group"):
        register(ddp, process_group=dist.group.WORLD)
    ddp.register_comm_hook(RHTState(), rht_hook)
    with pytest.raises(RuntimeError, match=r"has a communication hook already"):
        register(ddp)


def test_what_has_no_hook_is_refused(ranks: Ranks) -> None:
    ranks.run(refused, 2)


def shard(rank: int, world_size: int) -> str:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    with pytest.raises(TypeError) as caught:
        register(model)
    return str(caught.value)


def test_a_sharded_model_is_refused_by_name(ranks: Ranks) -> None:
    for message in ranks.run(shard, 2):
        assert "the model is sharded" in message
        assert "call rhtcomm.hooks.compress_fsdp(model) instead" in message


def differ(rank: int, world_size: int) -> str:
    ddp = DistributedDataParallel(net())
    with pytest.raises(rhtcomm.DisagreementError) as caught:
        register(ddp, bits=4 if rank else 3)
    return str(caught.value)


def test_ranks_that_differ_find_out_at_once(ranks: Ranks) -> None:
    for message in ranks.run(differ, 3):
        assert "configured differently in bits (3 on rank 0; 4 on ranks 1, 2)" in message


# ---- What it says and does --------------------------------------------------------------------


def say(rank: int, world_size: int) -> list[str]:
    with logged(logging.INFO) as lines:
        model = DistributedDataParallel(net())
        with register(model, bits=4, **OPTIONS) as handle:
            assert "Handle(RHTState(Codec(quantizer=QuicFL(bits=4" in repr(handle)
            backward(model, rank, 0)
            sent = handle.stats().bytes_sent
    return [*lines, f"{sent / 1e6:.2f} MB"]


def test_one_line_says_what_it_does(ranks: Ranks) -> None:
    (line, sent), *others = ranks.run(say, 2)
    assert line.startswith("rhtcomm: gradients of 2 ranks are averaged by Codec(quantizer=QuicFL")
    assert "over sockets" in line
    assert f"a rank sends about {sent} per step instead of 0.02 MB" in line
    assert [len(other) for other in others] == [1], "other ranks are silent"


def train_and_remove(rank: int, world_size: int) -> None:
    model, plain = (DistributedDataParallel(net()) for _ in range(2))
    handle = register(model, bits=1, **OPTIONS)
    assert not torch.equal(backward(model, rank, 0), backward(plain, rank, 0))
    handle.remove()
    for step in (1, 2):
        assert torch.equal(backward(model, rank, step), backward(plain, rank, step))
    assert handle.stats().steps == 1


def test_after_remove_gradients_are_those_of_plain_ddp(ranks: Ranks) -> None:
    ranks.run(train_and_remove, 3)


def never_called(rank: int, world_size: int) -> None:
    handle = register(DistributedDataParallel(net()), **OPTIONS)
    with pytest.warns(UserWarning, match="the hook was never called"):
        handle.close()
    handle.close()  # it says so once


def test_a_hook_that_was_never_called_warns(ranks: Ranks) -> None:
    ranks.run(never_called, 2)


def forget(rank: int, world_size: int) -> bool:
    """Whether the hook ends with its model."""
    model = DistributedDataParallel(net())
    handle = register(model, **OPTIONS)
    backward(model, rank, 0)
    engine = handle.state.engine
    assert engine is not None
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="its model is gone"):
        handle.state_dict()
    del handle
    gc.collect()
    return engine.ended


def test_it_ends_with_the_model(ranks: Ranks) -> None:
    assert ranks.run(forget, 2) == [True] * 2


# ---- Checkpoints ------------------------------------------------------------------------------


def resume(rank: int, world_size: int, saver: str, options: dict[str, Any], folder: str) -> None:
    options = {"bits": 2, **OPTIONS, **options}
    model = DistributedDataParallel(net(), bucket_cap_mb=0.005)
    with register(model, **options) as handle:
        for step in range(3):
            backward(model, rank, step)
        load = SAVERS[saver](handle, folder)
        expected = [backward(model, rank, step) for step in (3, 4)]
    again = DistributedDataParallel(net(), bucket_cap_mb=0.005)
    with register(again, **options) as resumed:
        load(resumed)
        for step, gradient in zip((3, 4), expected, strict=True):
            assert torch.equal(backward(again, rank, step), gradient)
    fresh = DistributedDataParallel(net(), bucket_cap_mb=0.005)
    with register(fresh, **options):
        assert not torch.equal(backward(fresh, rank, 3), expected[0]), "nothing was loaded"


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotations": "auto"},
        {"quantizer": "eden", "error_feedback": True},
        {"quantizer": "ecdq", "bits": 2.5, "error_feedback": True},
    ],
    ids=["plain", "auto", "error feedback", "ECDQ"],
)
def test_a_resumed_run_goes_on_with_the_same_bits(
    saver: str, options: dict[str, Any], tmp_path: Path, ranks: Ranks
) -> None:
    ranks.run(resume, 3, saver, options, str(tmp_path / "checkpoint"))


def take_anothers(rank: int, world_size: int) -> None:
    options = {"quantizer": "eden", "error_feedback": True, **OPTIONS}
    model = DistributedDataParallel(net())
    with register(model, **options) as handle:
        backward(model, rank, 0)
        saved = handle.state_dict()
        everybodys: list[Any] = [None] * world_size
        dist.all_gather_object(everybodys, saved)
        with pytest.raises(ValueError, match=rf"this rank needs residuals of rank {rank} of 2"):
            handle.load_state_dict(everybodys[1 - rank])
        handle.load_state_dict(everybodys[1 - rank] | {"residuals": {}})
        assert not any(r.any() for r in list(handle.state_dict().values())[-1].values())
        handle.load_state_dict(saved)
        for name, residual in saved[f"residuals of rank {rank} of 2"].items():
            assert torch.equal(
                residual, handle.state_dict()[f"residuals of rank {rank} of 2"][name]
            )
        assert residual.any()
    plain = DistributedDataParallel(net())
    with register(plain, quantizer="eden", **OPTIONS) as handle:
        backward(plain, rank, 0)
        with pytest.raises(ValueError, match="error_feedback=False, but what was saved has resid"):
            handle.load_state_dict(saved)


def test_no_rank_takes_the_residuals_of_another(ranks: Ranks) -> None:
    ranks.run(take_anothers, 2)


def register_a_copy(rank: int, world_size: int) -> None:
    """torch copies a model without its hook, though the copy still lists it."""
    model = DistributedDataParallel(net())
    with register(model, bits=8, **OPTIONS):
        backward(model, rank, 0)
        copied = copy.deepcopy(model)
        with register(copied, bits=8, **OPTIONS) as handle:
            assert everywhere(backward(copied, rank, 1))
            assert handle.stats().steps == 1


def test_the_copy_of_a_model_takes_a_hook(ranks: Ranks) -> None:
    ranks.run(register_a_copy, 2)
