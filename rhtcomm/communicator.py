"""How payloads travel: the few exchanges that the collectives are made of."""

from typing import Protocol

import torch
import torch.distributed as dist

__all__ = ["Communicator", "TorchCommunicator"]

# On Gloo one large message moves in fits and starts; pieces of this many bytes, all in flight at
# once, keep a link full.
_CHUNK_BYTES = 1 << 20


class Communicator(Protocol):
    """Blocking exchanges among `world_size` ranks; every rank makes the same calls in one order."""

    bytes_sent: int  # by this rank so far; reductions are counted as a ring's 2 (n - 1) / n

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x (m,) uint8 -> (world_size, m) uint8, row i being the x of rank i."""
        ...

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """x (world_size, m) uint8 -> (world_size, m), row i being rank i's row for this rank."""
        ...

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Sum of contiguous tensors over ranks, in place, the same bits on every rank."""
        ...


class TorchCommunicator:
    """Exchanges over a torch.distributed process group of any backend.

    Args:
        group: the process group, by default the world.

    Raises:
        RuntimeError: torch.distributed is not initialized.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "TorchCommunicator: torch.distributed is not initialized; call "
                "torch.distributed.init_process_group first (and launch by torchrun)"
            )
        self.group = group
        self.bytes_sent = 0
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        if self._rank < 0:
            raise RuntimeError("TorchCommunicator: this rank is not a member of the group")

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty(self.world_size, x.numel())
        works = [
            dist.all_gather(
                [row[chunk] for row in gathered], x[chunk], group=self.group, async_op=True
            )
            for chunk in _chunks(x.numel())
        ]
        for work in works:
            work.wait()
        self.bytes_sent += (self.world_size - 1) * x.numel()
        return gathered

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(x)
        pending = []
        for chunk in _chunks(x.shape[1], self.world_size):
            piece = x[:, chunk].contiguous()
            arrived = torch.empty_like(piece)
            work = dist.all_to_all_single(arrived, piece, group=self.group, async_op=True)
            pending.append((chunk, piece, arrived, work))
        for chunk, _, arrived, work in pending:
            work.wait()
            received[:, chunk] = arrived
        self.bytes_sent += (self.world_size - 1) * x.shape[1]
        return received

    def all_reduce_(self, x: torch.Tensor) -> None:
        dist.all_reduce(x, group=self.group)
        share = x.numel() * x.element_size() / self.world_size
        self.bytes_sent += round(2 * (self.world_size - 1) * share)


def _chunks(length: int, lanes: int = 1) -> list[slice]:
    step = max(1, _CHUNK_BYTES // lanes)
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]
