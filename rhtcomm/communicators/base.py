"""What the collectives ask of whatever carries their messages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch

__all__ = ["Communicator", "Topology", "name_of", "ring_bytes"]


def ring_bytes(nbytes: int, world_size: int) -> int:
    """What each of `world_size` ranks sends in a ring all-reduce of `nbytes` bytes."""
    return round(2 * (world_size - 1) * nbytes / world_size)


def name_of(rank: int, ranks: Sequence[int] | Mapping[int, int]) -> str:
    """A rank of a group in words; `ranks` has its number in the world."""
    return f"rank {rank}" + (f" (rank {ranks[rank]} of the world)" if ranks[rank] != rank else "")


class Topology(Protocol):
    """The ranks that average together, on one level or on two.

    A `Communicator` is flat: all its ranks exchange payloads with each other. A
    `HierarchicalCommunicator` has the ranks of a node in `within` and those that exchange payloads
    in `between`.
    """

    @property
    def within(self) -> "Communicator | None":
        """The ranks of this node, which exchange full precision; None where there is one level."""
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
        """By this rank so far, to other nodes where there are two levels."""
        ...

    def ring_bytes(self, nbytes: int) -> int:
        """What a rank sends in an uncompressed ring all-reduce of `nbytes` bytes."""
        ...

    def apart(self, device: str) -> "Topology":
        """The same ranks over connections of their own, for tensors on a kind of device.

        All ranks call it. Where such connections cannot be made, itself: see `private`.
        """
        ...

    def enqueues(self, device: str) -> bool:
        """Whether exchanges of tensors on a kind of device are queued on its current stream.

        Then waiting for one makes that stream wait, and not the host. By default the host waits.
        """
        return False

    def check_nodes(self, device: torch.device) -> None:
        """Before the first exchange, see that the levels fit each other; all ranks call it."""
        return None

    def carriers(self) -> list[object]:
        """What carries its messages, and may carry those of others (see `Users`)."""
        ...

    def name_of(self, rank: int) -> str:
        """A rank in words, by its number here and, where that differs, in the world."""
        ...

    @property
    def patience(self) -> str:
        """How long an exchange waits for other ranks, in words."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x (m,) uint8 -> (world_size, m) uint8, row i being the x of rank i; settled."""
        ...

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Sum or maximum of contiguous tensors over ranks, in place, the same bits everywhere."""
        ...

    def settle(self, wait: bool = True) -> None:
        """Called on all ranks alike when all exchanges started so far are finished there.

        With `wait`, it returns when the others have all that this rank sent. Without, later
        exchanges show that; but a rank must not leave before it has waited once more.
        """
        ...

    def abort(self) -> None:
        """Tell the others, where that is possible, that this rank gives up.

        Nothing can be exchanged after it.
        """
        ...

    def close(self) -> None:
        """End what is its own alone (see `apart`)."""
        ...


class Communicator(Topology, Protocol):
    """Exchanges among `world_size` ranks; every rank makes the same calls in one order.

    A `start_...` returns at once, with a function that waits for the result and returns it. Several
    exchanges may be in flight, to be finished in the order in which they were started; `settle`
    follows the last of them. What they send belongs to them until `settle` has waited.
    """

    bytes_sent: int = 0
    """By this rank so far. Reductions count as a ring's, a broadcast as sent by the root alone."""

    private: bool = False
    """Whether nobody else can send over what carries its messages."""

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
        """Contiguous x (m,) uint8 becomes that of rank 0, in place."""
        ...

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
        """By default nothing, and the others wait for their timeout."""
        return None

    def close(self) -> None:
        """By default nothing."""
        return None
