"""Gloo connections among the ranks of a process group that nobody else sends over."""

import contextlib
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["Group", "connect"]

_TAG = 0x726A  # for messages while connecting, on a group that others may use too
_MET, _CLOSED, _LATE = 0, 1, 2  # what the first rank says in front of the name
_REASONS = {
    _CLOSED: "the first rank found the connection to another closed by it",
    _LATE: "the first rank waited for another until its timeout",
}

_ProcessGroupGloo: Any = getattr(dist, "ProcessGroupGloo", object)  # a build of torch may lack it


class Group(_ProcessGroupGloo):  # type: ignore[misc]
    def __init__(self, name: str, *arguments: object) -> None:
        super().__init__(*arguments)
        self.group_name = name


def connect(parent: dist.ProcessGroup, timeout: timedelta, count: int = 1) -> list[Any]:
    """Private Gloo groups of the ranks of `parent`, unknown to torch; all of them must call it.

    torch names groups by a counter that each rank keeps for itself. Ranks that are also in other
    groups would wait for each other under different names. And the name of a destroyed group is
    reused, with the addresses of its closed connections.

    Raises:
        RuntimeError: a rank died or left, or did not connect in time.
    """
    rank, world_size = parent.rank(), parent.size()
    name, telling = _agree_on_a_name(parent, timeout)
    store: Any = distributed_c10d._get_default_store()
    # Not all kinds of store can be cloned.
    with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
        # A separate connection: a thread that waits at the store blocks other threads of this rank,
        # for which another rank may wait.
        store = store.clone()
    groups = []
    for number in range(count):
        own = distributed_c10d.PrefixStore(f"{name}/{number}", store)
        groups.append(Group(f"{name}/{number}", own, rank, world_size, timeout))
    store = distributed_c10d.PrefixStore(name, store)
    for told in telling:
        told.wait()  # they have connected, so they know the name
    # If a rank left while others still connect, one of them would fail, and the rest would wait for
    # that one until the timeout.
    if store.add("connected", 1) == world_size:
        store.set("all are", "connected")
    store.wait(["all are"], timeout)
    return groups


def _agree_on_a_name(parent: dist.ProcessGroup, timeout: timedelta) -> tuple[str, list[dist.Work]]:
    """A name drawn by the first rank, and the messages that are still in flight.

    The first rank sends the name once it has heard from all ranks. So if a rank has died or left,
    its connection to the first rank fails at once, whereas the rendezvous of a new group would wait
    for it.
    """
    rank, others = parent.rank(), range(1, parent.size())
    message = torch.tensor([_MET, *uuid.uuid4().bytes], dtype=torch.uint8, device="cpu")
    if rank > 0:
        here = parent.send([torch.zeros_like(message)], 0, _TAG)
        parent.recv([message], 0, _TAG).wait(timeout)
        here.wait()
        if message[0] != _MET:
            raise RuntimeError(_REASONS[int(message[0])])
        return _name_in(message), []
    lost: RuntimeError | None = None
    arriving = [parent.recv([torch.empty_like(message)], other, _TAG) for other in others]
    for arrival in arriving:
        try:
            arrival.wait(timeout)
        except RuntimeError as error:
            lost = lost or error
    if lost is None:
        return _name_in(message), [parent.send([message], other, _TAG) for other in others]
    message[0] = _LATE if "timed out" in str(lost).lower() else _CLOSED
    for other in others:
        with contextlib.suppress(RuntimeError):
            parent.send([message], other, _TAG).wait(timeout)
    raise lost


def _name_in(message: torch.Tensor) -> str:
    return f"rhtcomm/{bytes(message[1:].tolist()).hex()}"
