"""The ranks of the DDP model, and the connections over which their buckets are sent."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..communicators import Topology, TorchCommunicator, backend_of
from ..communicators.stripes import check_stripes
from .models import ranks_of

__all__ = ["check_communicator", "check_ranks", "check_timeout", "connect"]


def connect(
    device: torch.device,
    group: dist.ProcessGroup | None,
    given: Topology | None,
    timeout: timedelta | None,
    connections: int = 1,
) -> Topology:
    """Connections for buckets on a device; all ranks must call it.

    A transport that enqueues exchanges uses DDP's own group, where calls keep their order. A
    transport that blocks the host gets private connections, if possible.

    Args:
        group: DDP's, or the user's process_group; None: the world.
        given: the user's communicator, used instead.
        connections: to each other rank; see `TorchCommunicator`.

    Raises:
        RuntimeError: torch.distributed is not initialized, or another rank did not connect.
        ValueError: only one level of the given communicator blocks the host, or there can be only
            one connection.
    """
    if given is not None:
        if given.enqueues(device.type):
            check_stripes(given.between.connections, "a communicator that enqueues", device.type)
            return given
        _check_levels(given, device.type)
        return given.apart(device.type)
    group = group or dist.group.WORLD
    if group is None:
        raise RuntimeError(
            "rhtcomm.hooks: torch.distributed is not initialized; call "
            "torch.distributed.init_process_group first (and start the script with torchrun)"
        )
    check_stripes(connections, backend_of(group, device.type), device.type)
    shared = TorchCommunicator(group)
    if shared.enqueues(device.type):
        return shared
    return TorchCommunicator.of_its_own(group, device.type, timeout, connections)


def _check_levels(given: Topology, device: str) -> None:
    """A worker thread must not call a transport that enqueues, and autograd's thread should not
    wait."""
    if given.within is None or given.within.enqueues(device) == given.between.enqueues(device):
        return
    waits = "within a node" if given.between.enqueues(device) else "between nodes"
    raise ValueError(
        f"RHTState: exchanges of {device} tensors {waits} block the host, but those of the other "
        "level are queued on a stream (as with NCCL); the hook needs both levels of one kind: "
        "pass groups of the same backend to HierarchicalCommunicator"
    )


def check_communicator(
    communicator: object, process_group: object, timeout: object, connections: int, owner: str
) -> None:
    """Check that these arguments fit together.

    Raises:
        ValueError: a communicator was passed together with one of the others.
        TypeError: one of them has another type.
    """
    others = process_group is not None or timeout is not None or connections != 1
    if communicator is not None and others:
        raise ValueError(
            f"{owner}: a communicator has its own ranks, timeout and connections; leave out "
            "process_group, timeout and connections"
        )
    check_timeout(timeout, owner)
    if communicator is not None and not callable(getattr(communicator, "all_reduce_", None)):
        raise TypeError(
            f"{owner}: communicator={communicator!r} must be an object such as "
            "rhtcomm.MPICommunicator(); pass a process group as process_group"
        )
    if isinstance(communicator, type):
        raise TypeError(
            f"{owner}: communicator={communicator!r} is a class; pass an instance of it"
        )
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"{owner}: process_group={process_group!r} must be a process group, the one that "
            "DistributedDataParallel was given"
        )


def check_timeout(timeout: object, owner: str) -> None:
    if timeout is not None and not isinstance(timeout, timedelta):
        raise TypeError(
            f"{owner}: timeout={timeout!r} must be a datetime.timedelta, such as "
            "timedelta(minutes=5)"
        )
    if timeout is not None and timeout <= timedelta(0):
        raise ValueError(f"{owner}: timeout={timeout!r} must be positive")


def check_ranks(
    of_model: Sequence[int], process_group: dist.ProcessGroup | None, given: Any
) -> None:
    """Raise ValueError if a state was given other ranks than those of its model."""
    if process_group is not None and ranks_of(process_group) != of_model:
        raise ValueError(
            f"RHTState: process_group has the ranks {ranks_of(process_group)}, but the DDP model "
            f"that it is registered on averages over {of_model}; leave out process_group, or pass "
            "DDP's"
        )
    if given is None:
        return
    if given.world_size != len(of_model):
        raise ValueError(
            f"RHTState: its communicator has {given.world_size} ranks, but the DDP model that it "
            f"is registered on averages over {len(of_model)}; pass a communicator with the same "
            "ranks"
        )
    levels = (given.within, given.between) if given.within is not None else (given,)
    for level in levels:  # MPI numbers ranks in its own way
        if isinstance(level, TorchCommunicator) and not {*level.ranks} <= {*of_model}:
            raise ValueError(
                f"RHTState: its communicator has the ranks {level.ranks}, but the DDP model that "
                f"it is registered on averages over {of_model}; pass a communicator with the same "
                "ranks"
            )
