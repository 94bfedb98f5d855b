"""Two levels of ranks: those of a node, and those that exchange compressed payloads."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from rhtcomm.communicators.base import Communicator, Topology, name_of
from rhtcomm.communicators.torch import TorchCommunicator

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["HierarchicalCommunicator"]


class HierarchicalCommunicator(Topology):
    """Two levels, for several ranks per node: full precision within a node, compressed between
    nodes.

    Args:
        within: the ranks of this node.
        between: the ranks with the same place in their nodes as this one, one per node, in the same
            order for every place. Both are communicators or torch process groups.

    Each rank exchanges a share of the tensor with the ranks at its place in the other nodes, so
    `between` is a different group for each place in a node. All nodes must have the same number of
    ranks; otherwise the first exchange raises ValueError on all ranks.

    Raises:
        TypeError: a level is neither a communicator nor a process group.
        RuntimeError: torch.distributed is not initialized, or this rank is in neither group.
    """

    def __init__(
        self,
        within: "Communicator | dist.ProcessGroup",
        between: "Communicator | dist.ProcessGroup",
    ) -> None:
        for name, level in (("within", within), ("between", between)):
            if isinstance(level, (str, type)) or not (
                isinstance(level, dist.ProcessGroup) or hasattr(level, "start_all_gather")
            ):
                raise TypeError(
                    f"HierarchicalCommunicator: {name}={level!r} must be a communicator, such as "
                    "rhtcomm.MPICommunicator(), or a process group"
                )
        self._within, self._between = (
            TorchCommunicator(level) if isinstance(level, dist.ProcessGroup) else level
            for level in (within, between)
        )
        self._even = False

    @classmethod
    def from_mesh(cls, mesh: "DeviceMesh", connections: int = 1) -> "HierarchicalCommunicator":
        """From a two-dimensional DeviceMesh (nodes, ranks of a node).

        ``HierarchicalCommunicator.from_mesh(init_device_mesh("cpu", (nodes, ranks_of_a_node)))``

        Args:
            mesh: (nodes, ranks of a node), ranks in ascending order in every row and column.
            connections: TCP connections between two nodes for each place in a node; see
                `TorchCommunicator`.

        Raises:
            TypeError: mesh is not a DeviceMesh.
            ValueError: the mesh does not have two dimensions, or the order of its ranks differs
                from that in its groups; or connections is out of its range.
        """
        if not hasattr(mesh, "get_group"):
            raise TypeError(
                f"HierarchicalCommunicator: mesh={mesh!r} must be a DeviceMesh, as returned by "
                "torch.distributed.device_mesh.init_device_mesh"
            )
        if mesh.ndim != 2:
            raise ValueError(
                f"HierarchicalCommunicator: the mesh has {mesh.ndim} dimension(s), but needs two: "
                "(nodes, ranks of a node)"
            )
        # torch sorts the ranks of a group. Every rank checks the whole mesh, so all raise or none.
        rows: list[list[int]] = mesh.mesh.tolist()
        if any(list(line) != sorted(line) for line in (*rows, *zip(*rows, strict=True))):
            raise ValueError(
                f"HierarchicalCommunicator: the mesh lists ranks as {rows}, but torch sorts the "
                "ranks of the groups that it makes of rows and columns, so a rank's place in its "
                "node would differ from the mesh; list the ranks of every row and column in "
                "ascending order"
            )
        between = TorchCommunicator(mesh.get_group(0), connections)
        return cls(within=mesh.get_group(1), between=between)

    @property
    def within(self) -> Communicator:
        return self._within

    @property
    def between(self) -> Communicator:
        return self._between

    @property
    def private(self) -> bool:
        return self.within.private and self.between.private

    def apart(self, device: str) -> "HierarchicalCommunicator":
        """Private connections of both levels; see `Communicator.apart`."""
        within, between = self.within.apart(device), self.between.apart(device)
        if within is self.within and between is self.between:
            return self
        return HierarchicalCommunicator(within, between)

    def enqueues(self, device: str) -> bool:
        return self.within.enqueues(device) and self.between.enqueues(device)

    def carriers(self) -> list[object]:
        return [*self.within.carriers(), *self.between.carriers()]

    def name_of(self, rank: int) -> str:
        known = rank == self.rank and dist.is_initialized()
        return name_of(rank, {rank: dist.get_rank() if known else rank})

    @property
    def patience(self) -> str:
        return self.between.patience

    def close(self) -> None:
        """Close private connections of both levels (see `apart`), and nothing that the user
        passed."""
        for level in (self.within, self.between):
            if level.private:
                level.close()

    @property
    def bytes_sent(self) -> int:
        """Bytes sent by this rank to other nodes; `within.bytes_sent` has the rest."""
        return self.between.bytes_sent

    @property
    def rank(self) -> int:
        return self.between.rank * self.within.world_size + self.within.rank

    @property
    def world_size(self) -> int:
        return self.between.world_size * self.within.world_size

    def ring_bytes(self, nbytes: int) -> int:
        """Bytes that a rank would send to other nodes without compression."""
        return round(self.between.ring_bytes(nbytes) / self.within.world_size)

    def check_nodes(self, device: torch.device) -> None:
        """Before the first exchange, check that the ranks of both levels form a grid.

        All nodes must have the same number of ranks, all ranks of a node the same number in
        `between`, and all ranks of a `between` group the same place in their nodes.

        Raises:
            ValueError: on every rank, naming what differs.
        """
        if self._even:
            return
        within, between = self.within, self.between

        def differs(level: Communicator, number: int) -> bool:
            """Whether the ranks of a level have numbers that differ from this one's."""
            ends = torch.tensor([number, -number], device=device)
            level.all_reduce_(ends, "max")
            highest, lowest = ends.tolist()
            return bool(highest != -lowest)

        sizes = (within.world_size, between.world_size)
        crossed = differs(within, between.rank) | differs(between, within.rank)
        # The first place of a node sees all other nodes, and by the third step all places do.
        most = torch.tensor([*sizes, *(-size for size in sizes), crossed], device=device)
        for level in (within, between, within):
            level.all_reduce_(most, "max")
        ranks, nodes, fewest_ranks, fewest_nodes, anywhere = most.abs().tolist()
        if (ranks, nodes) != (fewest_ranks, fewest_nodes):
            raise ValueError(
                f"HierarchicalCommunicator: nodes have {fewest_ranks} to {ranks} ranks, and the "
                f"groups between nodes {fewest_nodes} to {nodes}; use the same number of ranks on "
                "all nodes, or one level"
            )
        if anywhere:
            raise ValueError(
                "HierarchicalCommunicator: the ranks of a node number the nodes differently, or "
                "the ranks of a group between nodes have different places in their nodes; list "
                "the ranks of all groups in the same order"
            )
        self._even = True

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x (m,) uint8 -> (world_size, m) uint8, row i being the x of rank i."""
        self.check_nodes(x.device)
        columns = self.between.all_gather(x)
        gathered = self.within.all_gather(columns.flatten())
        gathered = gathered.view(self.within.world_size, self.between.world_size, -1)
        return gathered.transpose(0, 1).flatten(0, 1)

    def settle(self, wait: bool = True) -> None:
        """Settle both levels; see `Communicator.settle`."""
        self.between.settle(wait)
        self.within.settle(wait)

    def abort(self) -> None:
        """Tell both levels that this rank has failed; see `TorchCommunicator.abort`.

        The remaining ranks learn of it only if those told first abort as well, as the hook does.
        """
        try:
            self.within.abort()
        finally:
            self.between.abort()

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Sum or maximum of contiguous tensors over ranks, in place, with the same bits on all
        ranks."""
        self.check_nodes(x.device)
        self.between.all_reduce_(x, op)
        # The second level in an order of its own making: all nodes must round alike.
        rows = self.within.all_gather(x.view(-1).view(torch.uint8)).view(x.dtype)
        total = rows[0]
        for row in rows[1:]:
            total = total + row if op == "sum" else total.maximum(row)
        x.copy_(total.view_as(x))
