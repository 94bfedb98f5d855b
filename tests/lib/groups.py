"""Communicators for tests: of one rank, of the user's own class, of two levels."""

import torch
import torch.distributed as dist

from rhtcomm import HierarchicalCommunicator, TorchCommunicator
from rhtcomm.communicators import Communicator

__all__ = ["Alone", "OfTheUser", "two_levels"]


class Alone(Communicator):
    """A communicator of one rank."""

    bytes_sent, rank, world_size = 0, 0, 1

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> None:
        pass


class OfTheUser(TorchCommunicator):
    """Does something of its own on the way, so the hook has to go by it."""


def two_levels(rank: int, nodes: int, ranks_of_a_node: int) -> HierarchicalCommunicator:
    """Rank i is number i % L of node i // L."""
    numbers = torch.arange(nodes * ranks_of_a_node).view(nodes, ranks_of_a_node)
    within, _ = dist.new_subgroups_by_enumeration(numbers.tolist())
    between, _ = dist.new_subgroups_by_enumeration(numbers.t().tolist())
    return HierarchicalCommunicator(within, between)
