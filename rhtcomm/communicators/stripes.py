"""Several connections to each other rank: long messages are cut into stripes, one for each.

Loss and a long way limit the speed of a single TCP connection. When a packet is lost, TCP lowers
its rate, and needs many round trips to recover; when a connection starts, or was idle, it needs
some until it is fast. Each connection does so for itself.
"""

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from rhtcomm.arguments import integer
from rhtcomm.communicators.gloo import connect
from rhtcomm.communicators.meeting import Meeting

__all__ = ["Stripes", "check_connections", "check_stripes", "cut"]

_MOST = 64  # connections to each other rank
_SHORTEST = 1 << 14  # bytes; TCP begins with about as many before it waits for an answer


def cut(message: torch.Tensor, connections: int) -> Sequence[torch.Tensor]:
    """The stripes of contiguous message (m,), in the order of the connections that carry them."""
    count = min(connections, message.nbytes // _SHORTEST)
    return message.tensor_split(count) if count > 1 else (message,)


class Stripes:
    """Further connections of the ranks of a process group on Gloo.

    Args:
        connections: the number of all connections to each other rank.
        timeout: for connecting.
    """

    def __init__(self, connections: int, timeout: timedelta) -> None:
        self._connections, self._timeout = connections, timeout
        self._groups: list[Any] = []

    def cut(self, message: torch.Tensor, group: Any) -> Sequence[torch.Tensor]:
        """The stripes of contiguous message (m,), in the order of the connections that carry them.

        `group` is the one of the first connection. With the first long message all ranks make the
        others. They have compared their number before, by a short message.

        Raises:
            RuntimeError: another rank did not connect.
        """
        stripes = cut(message, self._connections)
        if len(stripes) == 1:
            return stripes
        if not self._groups:
            self._connect(group)
        return stripes

    def _connect(self, group: Any) -> None:
        meeting, rank, world_size = Meeting(group, self._timeout), group.rank(), group.size()
        name = meeting.tell(uuid.uuid4().bytes)[0].hex()
        for number in range(1, self._connections):
            self._groups.append(connect(f"{name}/{number}", rank, world_size, self._timeout))
        meeting.end()

    def group(self, number: int) -> Any:
        """Of the connection with this number; the first one, 0, is not here."""
        return self._groups[number - 1]

    def close(self) -> None:
        self._groups.clear()


def check_connections(connections: object, owner: str) -> int:
    """The number of connections to each other rank, as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is not from 1 to 64.
    """
    found = integer(connections, owner, "connections")
    if not 1 <= found <= _MOST:
        raise ValueError(f"{owner}: connections={found} must be from 1 to {_MOST}")
    return found


def check_stripes(connections: int, backend: str, device: str) -> None:
    """Raise ValueError if there can be only one connection."""
    if connections > 1 and (backend, device) != ("gloo", "cpu"):
        raise ValueError(
            f"rhtcomm: connections={connections} is for CPU tensors on Gloo, but this is for "
            f"{device} tensors on {backend}; leave it out (NCCL has NCCL_SOCKET_NTHREADS and "
            "NCCL_NSOCKS_PERTHREAD instead)"
        )
