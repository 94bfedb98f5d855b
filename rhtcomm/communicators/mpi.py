"""Exchanges over MPI, by mpi4py."""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist

from rhtcomm.communicators.base import Communicator, name_of
from rhtcomm.memory import bytes_of

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["MPICommunicator"]

# What MPI itself adds up. NumPy has no bfloat16, and MPI knows 16 bits as integers, whose sum is no
# error but wrong; a sum in float16 would round on the way.
_SUMMED = (torch.float32, torch.float64, torch.int32, torch.int64)

Result = TypeVar("Result")


class MPICommunicator(Communicator):
    """Exchanges over MPI, by mpi4py's buffer interface; works without torch.distributed too.

    Start the ranks with mpiexec. Tensors must be in host memory.

    MPI's own waits spin on a core that the training thread needs. So requests are polled instead,
    with sleeps that grow while nothing arrives. (A request makes progress only while it is polled.)

    Args:
        comm: an mpi4py intracommunicator, by default COMM_WORLD. It is duplicated, so messages of
            the program and of the exchanges cannot be mixed up.
        timeout: seconds to wait for the other ranks in one exchange before raising; None waits
            forever. MPI cannot cancel an exchange: after a timeout the program can only exit. Nor
            can a rank tell the others that it failed, except by MPI_Abort, which ends the whole
            program. That is left to the program: `abort` does nothing.

    Raises:
        ImportError: mpi4py is not installed, or finds no MPI library.
        RuntimeError: the numbers of MPI ranks and torch ranks differ. This happens if only torchrun
            started the processes: each is then an MPI world of its own.
        TypeError: the timeout is not a number.
        ValueError: the timeout is not positive.
    """

    def __init__(self, comm: "MPI.Intracomm | None" = None, timeout: float | None = 1800.0) -> None:
        if timeout is not None and not isinstance(timeout, (int, float)):
            raise TypeError(
                f"MPICommunicator: timeout={timeout!r} must be a number of seconds, or None"
            )
        if timeout is not None and not timeout > 0:
            raise ValueError(f"MPICommunicator: timeout={timeout!r} must be positive, or None")
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as missing:
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
                    f"the program with mpiexec -n {expected} (see launch/mpirun.sh), not only with "
                    "torchrun"
                )
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise RuntimeError(
                "MPICommunicator: MPI was initialized without thread support; let mpi4py "
                "initialize it, or request MPI_THREAD_MULTIPLE"
            )
        self.comm = comm.Dup()
        self.timeout = timeout
        self.bytes_sent = 0
        self._in_flight: list[MPI.Request] = []
        self._in_place: Any = MPI.IN_PLACE
        self._ranks = MPI.Group.Translate_ranks(comm.Get_group(), None, MPI.COMM_WORLD.Get_group())
        self._operations: dict[str, Any] = {"sum": MPI.SUM, "max": MPI.MAX}

    @property
    def rank(self) -> int:
        return int(self.comm.rank)

    @property
    def world_size(self) -> int:
        return int(self.comm.size)

    def name_of(self, rank: int) -> str:
        return name_of(rank, self._ranks)

    @property
    def patience(self) -> str:
        return "its timeout" if self.timeout is None else f"its timeout of {self.timeout:g} s"

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        gathered = x.new_empty(self.world_size, x.numel())
        self.bytes_sent += (self.world_size - 1) * x.numel()
        request = self.comm.Iallgather(_host_array(x), _host_array(gathered))
        return self._finish(request, gathered)

    def start_all_to_all(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        x = x.contiguous()
        received = torch.empty_like(x)
        self.bytes_sent += (self.world_size - 1) * x.shape[1]
        request = self.comm.Ialltoall(_host_array(x), _host_array(received))
        return self._finish(request, received)

    def start_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        gathered = x.new_empty(self.world_size, x.numel()) if self.rank == 0 else None
        self.bytes_sent += 0 if self.rank == 0 else x.numel()
        target = None if gathered is None else _host_array(gathered)
        return self._finish(self.comm.Igather(_host_array(x), target), gathered)

    def start_broadcast(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.bytes_sent += (self.world_size - 1) * x.numel() if self.rank == 0 else 0
        return self._finish(self.comm.Ibcast(_host_array(x)), x)

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        self.start_all_reduce(x, op)()

    def start_all_reduce(
        self, x: torch.Tensor, op: Literal["sum", "max"] = "sum"
    ) -> Callable[[], torch.Tensor]:
        """As in `Communicator`.

        Raises:
            TypeError: x is of another dtype than float32, float64, int32 and int64.
        """
        if x.dtype not in _SUMMED:
            raise TypeError(
                f"MPICommunicator.all_reduce_: MPI cannot be trusted to add {x.dtype}; pass "
                "x.float(), or use rhtcomm.all_reduce, which takes bfloat16 and float16"
            )
        self.bytes_sent += self.ring_bytes(x.nbytes)
        request = self.comm.Iallreduce(self._in_place, _host_array(x), self._operations[op])
        return self._finish(request, x)

    def close(self) -> None:
        """Free the duplicated communicator; all ranks must call it."""
        self.comm.Free()

    def _finish(self, request: "MPI.Request", result: Result) -> Callable[[], Result]:
        """A function that waits for the request."""
        # MPI writes into the buffers, so they must live as long as the request, even if the caller
        # drops it.
        self._in_flight.append(request)
        request.Test()  # also makes progress on earlier ones

        def finish() -> Result:
            self._wait(request)
            self._in_flight = [other for other in self._in_flight if other is not request]
            return result

        return finish

    def _wait(self, request: "MPI.Request") -> None:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        pause = 0.0
        while not request.Test():
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(
                    f"MPICommunicator: {self.name_of(self.rank)} of {self.world_size} waited "
                    f"{self.timeout:g} s for the others: one of them died, hangs, or makes "
                    "different calls"
                )
            # The first polls only yield to other threads; later ones sleep and free the core.
            time.sleep(pause)
            pause = min(1e-3, pause + 1e-6)


def _host_array(x: torch.Tensor) -> Any:
    if x.device.type != "cpu":
        raise TypeError(
            f"MPICommunicator: a tensor lies on {x.device}, but MPI exchanges go through host "
            "memory; use TorchCommunicator there"
        )
    return bytes_of(x).view(str(x.dtype).removeprefix("torch."))
