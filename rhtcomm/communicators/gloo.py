"""A Gloo group that nobody else sends over."""

import contextlib
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["Group", "connect"]

_ProcessGroupGloo: Any = getattr(dist, "ProcessGroupGloo", object)  # a build of torch may lack it


class Group(_ProcessGroupGloo):  # type: ignore[misc]
    def __init__(self, name: str, *arguments: object) -> None:
        super().__init__(*arguments)
        self.group_name = name


def connect(name: str, rank: int, world_size: int, timeout: timedelta) -> Any:
    """A Gloo group of ranks that have met, unknown to torch; all of them must call it.

    torch names groups by a counter that each rank keeps for itself. Ranks that are also in other
    groups would wait for each other under different names. And the name of a destroyed group is
    reused, with the addresses of its closed connections. So the caller finds a new name.

    Raises:
        RuntimeError: a rank died or left, or did not connect in time.
    """
    store: Any = distributed_c10d._get_default_store()
    # Not all kinds of store can be cloned.
    with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
        # A separate connection: a thread that waits at the store blocks other threads of this rank,
        # for which another rank may wait.
        store = store.clone()
    store = distributed_c10d.PrefixStore(f"rhtcomm/{name}", store)
    group = Group(f"rhtcomm/{name}", store, rank, world_size, timeout)
    # If a rank left while others still connect, one of them would fail, and the rest would wait for
    # that one until the timeout.
    if store.add("connected", 1) == world_size:
        store.set("all are", "connected")
    store.wait(["all are"], timeout)
    return group
