"""The process groups that communicators are made over, make themselves, and give up."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks

from rhtcomm import TorchCommunicator

BOUND = torch.device("cuda", 3)


def record_new_group(rank: int, world_size: int) -> list[dict[str, Any]]:
    """What torch was asked for, with the ranks, over a world and a part of it that are bound to a
    device or not; their backend is not Gloo, over which no group of torch's is made."""
    asked: list[dict[str, Any]] = []

    def new_group(ranks: list[int], **options: Any) -> dist.ProcessGroup:
        asked.append({"ranks": ranks, **options})
        return gloo

    gloo, part = dist.new_group(), dist.new_group([0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", new_group)
        patch.setattr(dist, "get_backend_config", lambda group: "cpu:mpi,cuda:nccl")
        patch.setattr(dist, "get_backend", lambda group: "nccl")
        for parent in (dist.group.WORLD, part):
            if not isinstance(parent, dist.ProcessGroup):
                continue  # this rank is in no part
            for bound in (None, BOUND):
                patch.setattr(type(parent), "bound_device_id", bound)
                made = TorchCommunicator.of_its_own(parent, "cuda", timedelta(seconds=7))
                assert made.private
    return asked


def test_a_group_of_its_own_is_bound_to_the_device_of_its_parent(ranks: Ranks) -> None:
    common = {"timeout": timedelta(seconds=7), "backend": "nccl"}
    world = common | {"ranks": [0, 1, 2], "use_local_synchronization": False}
    part = common | {"ranks": [0, 1], "use_local_synchronization": True}
    first, second, third = ranks.run(record_new_group, 3)
    of_all = [world | {"device_id": None}, world | {"device_id": BOUND}]
    assert first == second == [*of_all, part | {"device_id": None}, part | {"device_id": BOUND}]
    assert third == of_all


def abort_a_group(rank: int, world_size: int, config: str) -> bool:
    """Whether torch still knows it."""
    group = dist.new_group()
    communicator = TorchCommunicator(group)
    communicator.all_reduce_(torch.ones(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: config)
        communicator.abort()
    with pytest.raises(RuntimeError, match="failed and left the group"):
        communicator.all_reduce_(torch.ones(3))
    return group in dist.distributed_c10d._world.pg_map


@pytest.mark.parametrize("config", ["cpu:gloo,cuda:gloo", "cpu:gloo", "cpu:gloo,cuda:nccl", "gloo"])
def test_only_what_is_on_gloo_alone_is_destroyed(config: str, ranks: Ranks) -> None:
    """NCCL might block, and DDP needs its group."""
    assert ranks.run(abort_a_group, 2, config) == ["nccl" in config] * 2
