"""The ranks of a benchmark: their places, what they tell each other, and starting some here."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore, rendezvous  # type: ignore[attr-defined]

__all__ = ["Place", "Ranks", "find_place", "first_host", "join", "spawn"]

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=2)  # that a rank waits for the others before the run ends


@dataclass(frozen=True)
class Place:
    """Where a launcher put this process."""

    rank: int
    world_size: int
    local_rank: int | None  # on its node
    local_world_size: int | None
    launcher: str


# Variables of rank, world size, rank on the node, and ranks of the node.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
}


def find_place(environment: Mapping[str, str]) -> Place | None:
    """By the variables of torchrun, MPI's launchers or srun; None: none of them started this."""
    for launcher, names in _LAUNCHERS.items():
        rank, world_size, local_rank, local_size = (environment.get(name) for name in names)
        if rank is None or world_size is None:
            continue
        # A shell inside of `salloc` or `sbatch` has Slurm's variables too, but no step.
        if launcher == "srun" and "SLURM_STEP_ID" not in environment:
            continue
        return Place(
            int(rank),
            int(world_size),
            None if local_rank is None else int(local_rank),
            None if local_size is None else int(local_size),
            launcher,
        )
    return None


class Ranks:
    """The ranks of torch's default group, and the device of this one."""

    def __init__(self, device: torch.device, local_world_size: int | None = None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.nodes, self.ranks_per_node = self._nodes(local_world_size)

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

    def _nodes(self, local_world_size: int | None) -> tuple[int, int]:
        """Nodes, and ranks of each; a launcher that does not say it leaves names to compare."""
        own = (socket.gethostname(), local_world_size)
        everybody: list[Any] = [None] * self.world_size
        dist.all_gather_object(everybody, own)
        sizes = {size for _, size in everybody}
        if sizes == {None}:
            names = [name for name, _ in everybody]
            sizes = {names.count(name) for name in names}
            per_node = sizes.pop()
            nodes = [names[i : i + per_node] for i in range(0, len(names), per_node)]
            if sizes or any(len(set(node)) > 1 for node in nodes):
                return len(set(names)), 1  # uneven, or not one node after the other
            return len(nodes), per_node
        per_node = sizes.pop()
        if sizes or self.world_size % per_node:
            return self.world_size, 1
        return self.world_size // per_node, int(per_node)


def join(place: Place, backend: str | None, device: str | None) -> tuple[torch.device, Store]:
    """Initialize torch.distributed; the device that this rank works on, and the ranks' store.

    Raises:
        ValueError: there is no such device, or no address to meet at.
    """
    chosen = _device(place, device)
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.world_size))
    if "MASTER_ADDR" not in os.environ:
        address, port = _meeting_point(place)
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    os.environ.setdefault("MASTER_PORT", "29500")
    if backend is None:
        backend = {"cuda": "nccl", "xpu": "xccl"}.get(chosen.type, "gloo")
    bound = None if backend == "gloo" or chosen.type == "cpu" else chosen
    store, rank, world_size = next(
        rendezvous("env://", place.rank, place.world_size, timeout=_TIMEOUT)
    )
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=bound,
    )
    return chosen, store


def _device(place: Place, device: str | None) -> torch.device:
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    local = place.rank if place.local_rank is None else place.local_rank
    if local >= count:
        raise ValueError(
            f"rhtcomm bench: rank {place.rank} is number {local} on its node, which has {count} "
            f"device(s) of kind {kind}; start fewer ranks per node, or give --device cpu"
        )
    chosen = torch.device(kind, local)
    torch.accelerator.set_device_index(local)
    return chosen


def _meeting_point(place: Place) -> tuple[str, int]:
    """An address and a port of rank 0, for launchers that name none."""
    if place.launcher == "srun":
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
        port = 20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000
        return first_host(nodes), port
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's wheels say so where there is no MPI
        raise ValueError(
            "rhtcomm bench: MPI's launcher names no address to meet at, and mpi4py does not load "
            f"({error}); pip install 'rhtcomm[mpi]', or set MASTER_ADDR and MASTER_PORT on all "
            "ranks"
        ) from error
    if MPI.COMM_WORLD.size != place.world_size:
        raise ValueError(
            f"rhtcomm bench: the launcher started {place.world_size} ranks, but mpi4py sees "
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


def first_host(nodes: str) -> str:
    """Of a list as Slurm writes it: node[03-05,7],gpu1 begins with node03."""
    matched = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if matched is None:
        raise ValueError(f"rhtcomm bench: {nodes!r} is no list of Slurm's nodes; set MASTER_ADDR")
    return matched[1] + (matched[2] or "")


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
    return _first_failure(processes)


def _first_failure(processes: list["subprocess.Popen[bytes]"]) -> int:
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
        for process in left:
            process.wait(5)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return 128 - status if status < 0 else status
