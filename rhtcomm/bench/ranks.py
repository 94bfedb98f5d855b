"""The ranks of a benchmark: their places, what they tell each other, and starting some here."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from rhtcomm.doctor.launcher import Launch

__all__ = ["TIMEOUT", "Ranks", "first_failure", "join", "spawn"]

T = TypeVar("T")
TIMEOUT = timedelta(minutes=2)  # that a rank waits for the others before the run ends
LEAVE = 5.0  # seconds that ranks get to say what they know, when one has ended
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


class Ranks:
    """The ranks of torch's default group, and the device of this one."""

    def __init__(self, device: torch.device, ranks_per_node: int = 1) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.nodes, self.ranks_per_node = self._nodes(ranks_per_node)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def tell(self, value: T) -> T:
        """The value that rank 0 has; so all ranks decide alike."""
        box: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        told: T = box[0]
        return told

    def largest(self, *values: float) -> list[float]:
        """Of each value the largest over ranks."""
        both = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        found: list[float] = both.tolist()
        return found

    def _nodes(self, ranks_per_node: int) -> tuple[int, int]:
        """Nodes, and ranks of each: 1 where nodes differ in that."""
        fewest, most = self.largest(-ranks_per_node, ranks_per_node)
        if -fewest != most or self.world_size % ranks_per_node:
            return self.world_size, 1
        return self.world_size // ranks_per_node, ranks_per_node


def join(launch: Launch, backend: str | None, device: str | None) -> tuple[torch.device, Store]:
    """Initialize torch.distributed; the device that this rank works on, and the ranks' store.

    Raises:
        ValueError: there is no such device, or no address to meet at.
    """
    chosen = _device(launch, device)
    address, port = launch.address, launch.port
    if address is None or port is None:
        address, port = _meeting_point(launch)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if backend is None:
        backend = {"cuda": "nccl", "xpu": "xccl"}.get(chosen.type, "gloo")
    bound = None if backend == "gloo" or chosen.type == "cpu" else chosen
    store, rank, world_size = next(
        rendezvous("env://", launch.rank, launch.world_size, timeout=TIMEOUT)
    )
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=bound,
    )
    return chosen, store


def _device(launch: Launch, device: str | None) -> torch.device:
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    names = [name for name in _LOCAL_RANKS if name in os.environ]
    local = int(os.environ[names[0]]) if names else launch.rank
    if local >= count:
        raise ValueError(
            f"rhtcomm bench: rank {launch.rank} is number {local} on its node, which has {count} "
            f"device(s) of kind {kind}; start fewer ranks per node, or give --device cpu"
        )
    chosen = torch.device(kind, local)
    torch.accelerator.set_device_index(local)
    return chosen


def _meeting_point(launch: Launch) -> tuple[str, int]:
    """An address and a port of rank 0, which MPI carries where the launcher names none."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's wheels say so where there is no MPI
        raise ValueError(
            f"rhtcomm bench: {launch.name} names no address to meet at, and mpi4py does not load "
            f"({error}); pip install 'rhtcomm[mpi]', or set MASTER_ADDR and MASTER_PORT on all "
            "ranks"
        ) from error
    if MPI.COMM_WORLD.size != launch.world_size:
        raise ValueError(
            f"rhtcomm bench: the launcher started {launch.world_size} ranks, but mpi4py sees "
            f"{MPI.COMM_WORLD.size}: it was built for another MPI; use the mpiexec of that one"
        )
    found: tuple[str, int] = MPI.COMM_WORLD.bcast(_free_address())
    return found


def _free_address() -> tuple[str, int]:
    """An address that other machines reach this one by, and a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, port)
    except OSError:
        name = "127.0.0.1"
    return name, port


def spawn(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m rhtcomm bench` with these arguments on `count` ranks of this machine.

    Returns:
        The first exit status that is not 0, else 0. When a rank ends with such a one, the others
        get five seconds to say what they know.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [sys.executable, "-m", "rhtcomm", "bench", *arguments]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    return first_failure(processes)


def _wait(processes: list["subprocess.Popen[bytes]"]) -> None:
    """Until all have ended, or for `LEAVE`."""
    end = time.monotonic() + LEAVE
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))


def first_failure(processes: list["subprocess.Popen[bytes]"]) -> int:
    """See `spawn`. No process is left, whether this one is interrupted (130) or told to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    left, status = list(processes), 0
    try:
        while left and not status:
            for process in list(left):
                try:
                    status = process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
                left.remove(process)
                if status:
                    break
        _wait(left)
        if status < 0 and any(process.poll() is None for process in left):  # nobody noticed
            rank = processes.index(process)
            print(
                f"rhtcomm bench: rank {rank} of {len(processes)} was killed by signal {-status}",
                file=sys.stderr,
            )
    except KeyboardInterrupt:  # which the ranks of a terminal get too
        status = status or 130
        _wait(left)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return 128 - status if status < 0 else status
