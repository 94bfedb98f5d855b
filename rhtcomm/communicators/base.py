"""The interface between the collectives and their transport."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch

__all__ = ["Communicator", "Topology", "name_of", "ring_bytes"]


def ring_bytes(nbytes: int, world_size: int) -> int:
    """Bytes that each of `world_size` ranks sends in a ring all-reduce of `nbytes` bytes."""
    return round(2 * (world_size - 1) * nbytes / world_size)


def name_of(rank: int, ranks: Sequence[int] | Mapping[int, int]) -> str:
    """A rank of a group in words; `ranks` has the world ranks of the group."""
    return f"rank {rank}" + (f" (rank {ranks[rank]} of the world)" if ranks[rank] != rank else "")


class Topology(Protocol):
    """The ranks that average together, on one level or on two.

    A `Communicator` is flat: all its ranks exchange payloads with each other. In a
    `HierarchicalCommunicator`, `within` has the ranks of a node and `between` those that exchange
    payloads.
    """

    @property
    def within(self) -> "Communicator | None":
        """The ranks of this node, which exchange full precision; None if there is one level."""
        ...

    @property
    def between(self) -> "Communicator":
        """The ranks that exchange payloads."""
        ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def private(self) -> bool:
        """Whether nobody else can send over what carries its messages."""
        ...

    @property
    def bytes_sent(self) -> int:
        """Bytes sent by this rank so far; with two levels, only those to other nodes."""
        ...

    def ring_bytes(self, nbytes: int) -> int:
        """Bytes that a rank sends in an uncompressed ring all-reduce of `nbytes` bytes."""
        ...

    def apart(self, device: str) -> "Topology":
        """The same ranks over private connections, for tensors on a kind of device.

        All ranks must call it. Returns itself if such connections cannot be made; see `private`.
        """
        ...

    def enqueues(self, device: str) -> bool:
        """Whether exchanges of tensors on a kind of device are queued on its current stream.

        If so, waiting for an exchange blocks that stream and not the host. By default it blocks the
        host.
        """
        return False

    def check_nodes(self, device: torch.device) -> None:
        """Before the first exchange, check that the levels fit each other; all ranks must call
        it."""
        return None

    def carriers(self) -> list[object]:
        """The objects that carry its messages, and may carry those of others (see `Users`)."""
        ...

    def name_of(self, rank: int) -> str:
        """A rank in words, with its number here and, if different, in the world."""
        ...

    @property
    def patience(self) -> str:
        """How long an exchange waits for other ranks, in words."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x (m,) uint8 -> (world_size, m) uint8, row i being the x of rank i; settled."""
        ...

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Sum or maximum of contiguous tensors over ranks, in place, with the same bits on all
        ranks."""
        ...

    def settle(self, wait: bool = True) -> None:
        """Called on all ranks after all exchanges started so far have finished.

        With `wait`, it returns when the others have received everything that this rank sent.
        Without, later exchanges confirm that; but a rank must wait once more before it leaves.
        """
        ...

    def abort(self) -> None:
        """Tell the other ranks, if possible, that this rank has failed.

        No exchange is possible afterwards.
        """
        ...

    def close(self) -> None:
        """Close private connections (see `apart`)."""
        ...


class Communicator(Topology, Protocol):
    """Exchanges among `world_size` ranks; all ranks make the same calls in the same order.

    A `start_...` returns at once, with a function that waits for the result and returns it. Several
    exchanges may be in flight; finish them in the order in which they were started (all-reduces in
    any order that is the same on all ranks), then call `settle`. Do not change tensors that are
    being sent until `settle` has waited.
    """

    bytes_sent: int = 0
    """Bytes sent by this rank so far. Reductions count as ring all-reduces, broadcasts as sent only
    by the root."""

    private: bool = False
    """Whether nobody else can send over what carries its messages."""

    connections: int = 1
    """TCP connections to each other rank, over which long messages are striped."""

    @property
    def within(self) -> None:
        return None

    @property
    def between(self) -> "Communicator":
        return self

    def ring_bytes(self, nbytes: int) -> int:
        return ring_bytes(nbytes, self.world_size)

    def apart(self, device: str) -> "Communicator":
        return self

    def carriers(self) -> list[object]:
        return [self]

    def name_of(self, rank: int) -> str:
        return f"rank {rank}"

    @property
    def patience(self) -> str:
        return "its timeout"

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """x (m,) uint8 -> (world_size, m) uint8, row i being the x of rank i."""
        ...

    def start_all_to_all(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """x (world_size, m) uint8 -> (world_size, m), row i being rank i's row for this rank."""
        ...

    def start_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        """x (m,) uint8 -> on rank 0 (world_size, m), row i the x of rank i; elsewhere None."""
        ...

    def start_broadcast(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Replace contiguous x (m,) uint8 by that of rank 0, in place."""
        ...

    def start_all_reduce(
        self, x: torch.Tensor, op: Literal["sum", "max"] = "sum"
    ) -> Callable[[], torch.Tensor]:
        """`all_reduce_` of `x` by `op`; by default it is made at once."""
        self.all_reduce_(x, op)
        return lambda: x

    def settle(self, wait: bool = True) -> None:
        return None

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = self.start_all_gather(x)()
        self.settle()
        return gathered

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """x (world_size, m) uint8 -> (world_size, m): `start_all_to_all`, finished and settled."""
        received = self.start_all_to_all(x)()
        self.settle()
        return received

    def abort(self) -> None:
        """By default does nothing; the others wait for their timeout."""
        return None

    def close(self) -> None:
        """By default does nothing."""
        return None
