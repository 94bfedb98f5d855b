"""compress_fsdp over replicas of a sharded model, as in HSDP, and in place of DDP."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from sharded import (
    CLOSE,
    FINE,
    backward,
    errors,
    exact_mean,
    layers,
    net,
    same,
    sharded,
)
from states import GAVE_UP, SOON
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rhtcomm import DisagreementError
from rhtcomm.hooks import Handle, compress_fsdp


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def replicated(mesh: DeviceMesh, **options: Any) -> tuple[nn.Module, Handle]:
    model = sharded(net(), mesh["shard"])
    group = mesh.get_group("replicate")
    return model, compress_fsdp(model, replicate_group=group, **(FINE | options))


def everywhere(values: dict[str, torch.Tensor]) -> bool:
    """Whether all ranks have the same bits."""
    flat = torch.cat([x.flatten() for x in values.values()])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return all(torch.equal(other, flat) for other in others)


def train(rank: int, world_size: int, shape: tuple[int, int]) -> float:
    model, handle = replicated(mesh_of(*shape))
    optimizer, worst = torch.optim.Adam(model.parameters(), 1e-3), 0.0
    with handle:
        for step in range(3):
            found = backward(model, rank, step)
            worst = max(worst, *errors(found, exact_mean(model, list(range(world_size)), step)))
            optimizer.step()
            assert everywhere({name: p.full_tensor() for name, p in model.named_parameters()})
        exchanges = sum(ranks > 1 for ranks in shape)  # of each unit in a step
        assert handle.stats().rotations[2] == 3 * 3 * exchanges
        assert handle.stats().steps == 3
    return worst


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (3, 1), (4, 1)], ids=str)
def test_replicas_average_their_shards_and_stay_the_same(
    shape: tuple[int, int], ranks: Ranks
) -> None:
    assert max(ranks.run(train, shape[0] * shape[1], shape)) < CLOSE


def divide(rank: int, world_size: int, factor: float | None) -> list[float]:
    """As torch's own HSDP does; its gradients come first."""
    found = []
    for native in (True, False):
        mesh = mesh_of(2, 2)
        if native:
            model = sharded(net(), mesh)
        else:
            model, handle = replicated(mesh)
        for unit in layers(model) if factor is not None else ():
            unit.set_gradient_divide_factor(factor)
        found.append(backward(model, rank, 0))
    handle.close()
    return errors(found[1], {name: x.double() for name, x in found[0].items()})


@pytest.mark.parametrize("factor", [None, 2.0])
def test_divide_factors_mean_what_they_mean_to_torch(factor: float | None, ranks: Ranks) -> None:
    for outcome in ranks.run(divide, 4, factor):
        assert max(outcome) < CLOSE


def remove(rank: int, world_size: int) -> None:
    mesh = mesh_of(2, 2)
    model, handle = replicated(mesh, bits=1)
    native = sharded(net(), mesh)
    assert max(errors(backward(model, rank, 0), backward(native, rank, 0))) > CLOSE
    handle.remove()
    exact = exact_mean(model, list(range(world_size)), 1)
    assert max(errors(backward(model, rank, 1), exact)) < 1e-5


def test_after_remove_replicas_average_exactly(ranks: Ranks) -> None:
    ranks.run(remove, 4)


def resume(rank: int, world_size: int) -> None:
    mesh = mesh_of(2, 2)
    model, handle = replicated(mesh, bits=2)
    backward(model, rank, 0)
    saved = handle.state_dict()
    saved_everywhere: list[Any] = [None] * world_size
    dist.all_gather_object(saved_everywhere, saved)
    assert saved_everywhere == [saved] * world_size
    expected = backward(model, rank, 1)
    handle.close()
    again, resumed = replicated(mesh, bits=2)
    with resumed:
        resumed.load_state_dict(saved)
        assert same(backward(again, rank, 1), expected)


def test_a_resumed_run_goes_on_with_the_same_bits(ranks: Ranks) -> None:
    ranks.run(resume, 4)


def differ(rank: int, world_size: int) -> str:
    """The replicas of one shard, or what should be such, differ."""
    mesh = mesh_of(2, 2)
    model = sharded(net(), mesh["shard"])
    groups = {pair: dist.new_group(list(pair)) for pair in ((0, 3), (1, 2))}
    group = next(group for pair, group in groups.items() if rank in pair)
    with pytest.raises(DisagreementError) as caught:
        compress_fsdp(model, replicate_group=group, **FINE)
    return str(caught.value)


def test_replicas_of_other_shards_are_found_out(ranks: Ranks) -> None:
    for message in ranks.run(differ, 4):
        assert "configured differently in shard (0 on rank 0" in message or "shard (1" in message


def load_apart(rank: int, world_size: int) -> str:
    """Replicas load other steps, after one that was the same."""
    model, handle = replicated(mesh_of(2, 1))
    with handle:
        backward(model, rank, 0)
        handle.load_state_dict({"seed": 0, "step": 5 + rank})
        with pytest.raises(DisagreementError) as caught:
            backward(model, rank, 1)
    return str(caught.value)


def test_replicas_that_load_other_steps_are_found_out(ranks: Ranks) -> None:
    for message in ranks.run(load_apart, 2):
        assert "configured differently in step (5 on rank 0; 6 on rank 1)" in message


def fail(rank: int, world_size: int) -> str:
    """Of four ranks one fails: the one that shares its shard, and the one with its replica, hear of
    it, and from them so does the last one."""

    def excluded(parameter: torch.Tensor) -> bool:
        if rank == 3:
            raise ValueError("no idea")
        return False

    model, handle = replicated(mesh_of(2, 2), exclude=excluded, timeout=SOON)
    with handle:
        with pytest.raises((RuntimeError, ValueError)) as caught:
            backward(model, rank, 0)
        dist.barrier()  # nobody leaves, by which the others would hear of it too
    return str(caught.value)


def test_an_error_of_one_rank_ends_all(ranks: Ranks) -> None:
    *others, last = ranks.run(fail, 4, timeout=30)
    assert last == "no idea"
    for other in others:
        assert GAVE_UP in other
