"""How payloads travel: the few exchanges that the collectives are made of."""

import os
import time
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator", "MPICommunicator", "TorchCommunicator"]

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

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Sum or maximum of contiguous tensors over ranks, in place, the same bits everywhere."""
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

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        dist.all_reduce(x, kind, group=self.group)
        self.bytes_sent += _ring_bytes(x, self.world_size)


class MPICommunicator:
    """Exchanges over MPI, by mpi4py's buffer interface; works without torch.distributed too.

    Start the ranks with mpiexec. Tensors must be in host memory.

    MPI's own waits spin on a core, which here the training thread needs: requests are polled
    instead, with sleeps that grow while nothing arrives. (A request makes progress only while
    somebody polls it.)

    Args:
        comm: an mpi4py intracommunicator, by default COMM_WORLD. It is duplicated, so messages
            of the program and of the exchanges cannot meet.
        timeout: seconds to wait for the other ranks in one exchange before raising; None waits for
            ever. MPI cannot take a started exchange back: after a timeout the program can only end.

    Raises:
        ImportError: mpi4py is not installed.
        RuntimeError: MPI knows another number of ranks than torch does, as it happens where
            torchrun alone started the processes: then each is an MPI world of its own.
    """

    def __init__(self, comm: "MPI.Intracomm | None" = None, timeout: float | None = 1800.0) -> None:
        try:
            from mpi4py import MPI
        except ImportError as missing:
            raise ImportError(
                "MPICommunicator needs mpi4py and an MPI library: pip install 'rhtcomm[mpi]'"
            ) from missing
        if comm is None:
            comm = MPI.COMM_WORLD
            expected = os.environ.get("WORLD_SIZE")
            if dist.is_initialized():
                expected = str(dist.get_world_size())
            if expected is not None and int(expected) != comm.size:
                raise RuntimeError(
                    f"MPICommunicator: MPI has {comm.size} rank(s) but torch has {expected}; start "
                    f"the program with mpiexec -n {expected} (see launch/mpirun.sh), not by "
                    "torchrun alone"
                )
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise RuntimeError(
                "MPICommunicator: MPI was initialized without support for threads; let mpi4py "
                "initialize it, or ask for MPI_THREAD_MULTIPLE"
            )
        self.comm = comm.Dup()
        self.timeout = timeout
        self.bytes_sent = 0
        self._in_place: Any = MPI.IN_PLACE
        self._operations: dict[str, Any] = {"sum": MPI.SUM, "max": MPI.MAX}

    @property
    def rank(self) -> int:
        return int(self.comm.rank)

    @property
    def world_size(self) -> int:
        return int(self.comm.size)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty(self.world_size, x.numel())
        self._wait(self.comm.Iallgather(_host_array(x), _host_array(gathered)))
        self.bytes_sent += (self.world_size - 1) * x.numel()
        return gathered

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(x)
        self._wait(self.comm.Ialltoall(_host_array(x), _host_array(received)))
        self.bytes_sent += (self.world_size - 1) * x.shape[1]
        return received

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        self._wait(self.comm.Iallreduce(self._in_place, _host_array(x), self._operations[op]))
        self.bytes_sent += _ring_bytes(x, self.world_size)

    def close(self) -> None:
        """Free the duplicated communicator; all ranks must call it."""
        self.comm.Free()

    def _wait(self, request: "MPI.Request") -> None:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        pause = 0.0
        while not request.Test():
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(
                    f"MPICommunicator: rank {self.rank} of {self.world_size} waited "
                    f"{self.timeout:g} s for the others: one of them died, hangs, or makes other "
                    "calls than this one"
                )
            # The first polls only give way to other threads, the later ones to the whole core.
            time.sleep(pause)
            pause = min(1e-3, pause + 1e-6)


def _host_array(x: torch.Tensor) -> Any:
    if x.device.type != "cpu":
        raise TypeError(
            f"MPICommunicator: a tensor lies on {x.device}, but MPI exchanges go through host "
            "memory; use TorchCommunicator there"
        )
    return x.detach().numpy()


def _ring_bytes(x: torch.Tensor, world_size: int) -> int:
    """What a rank sends in a ring all-reduce."""
    return round(2 * (world_size - 1) * x.numel() * x.element_size() / world_size)


def _chunks(length: int, lanes: int = 1) -> list[slice]:
    step = max(1, _CHUNK_BYTES // lanes)
    return [slice(at, min(at + step, length)) for at in range(0, length, step)]
