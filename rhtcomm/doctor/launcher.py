"""Who started this process, and as which rank."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["Launch", "launch_of", "own_launch"]

Name = Literal["none", "torchrun", "environment", "Open MPI", "Intel MPI", "MPICH", "srun"]


@dataclass(frozen=True)
class Launch:
    """What the environment says.

    Attributes:
        name: of the launcher; "environment" where RANK and WORLD_SIZE come from something else than
            torchrun, "none" without a launcher.
        local_size: ranks on this machine, at least 1.
        machines: how many the ranks are on, where the ranks have found out.
        local_cores: those that any rank of this machine may run on, where they have found out.
        address, port: where the ranks can meet, if the environment tells.
        agent: whether torchrun holds the store at that port.
        has_mpi: whether MPI should have all these ranks in its world.
    """

    name: Name = "none"
    rank: int = 0
    world_size: int = 1
    local_size: int = 1
    address: str | None = None
    port: int | None = None
    agent: bool = False
    has_mpi: bool = False
    machines: int | None = None
    local_cores: int | None = None

    @property
    def on_one_machine(self) -> bool:
        if self.machines is not None:
            return self.machines == 1
        return self.local_size == self.world_size


def launch_of(environment: Mapping[str, str], parent: int = 0) -> Launch:
    """Reads the variables that torchrun, mpiexec and srun set.

    Args:
        parent: process that all ranks of this machine have in common, to make a port of.

    Raises:
        ValueError: one of the variables is no number.
    """

    def number(name: str, default: int = 0) -> int:
        value = environment.get(name) or default
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{name}={value!r} must be a number") from None

    port = number("MASTER_PORT") or None
    address = environment.get("MASTER_ADDR") or None
    if "RANK" in environment and "WORLD_SIZE" in environment:
        elastic = "TORCHELASTIC_RUN_ID" in environment
        here = number("WORLD_SIZE") if address in ("127.0.0.1", "localhost", "::1") else 1
        return Launch(
            "torchrun" if elastic else "environment",
            number("RANK"),
            number("WORLD_SIZE"),
            number("LOCAL_WORLD_SIZE", here),
            address,
            port,
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    tasks = number("SLURM_STEP_NUM_TASKS", 1)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        name: Name = "Open MPI"
        rank, size = number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE")
        local = number("OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    elif "PMI_SIZE" in environment and ("MPI_LOCALNRANKS" in environment or tasks == 1):
        name = "Intel MPI" if "I_MPI_HYDRA_UUID" in environment else "MPICH"
        rank, size = number("PMI_RANK"), number("PMI_SIZE")
        local = number("MPI_LOCALNRANKS", size)
    elif "SLURM_STEP_NUM_TASKS" in environment and tasks > 1:
        name, rank, size = "srun", number("SLURM_PROCID"), tasks
        local = _tasks_here(environment)
    else:
        return Launch()
    has_mpi = name != "srun" or "PMI_SIZE" in environment or "PMIX_RANK" in environment
    if address is None or port is None:
        unique = parent if name != "srun" else number("SLURM_JOB_ID") * 16 + number("SLURM_STEP_ID")
        address = "127.0.0.1" if local == size else _first_host(environment)
        port = 20_000 + unique % 10_000  # below those that systems give away
    return Launch(name, rank, size, local, address, port, has_mpi=has_mpi)


def _tasks_here(environment: Mapping[str, str]) -> int:
    """From SLURM_STEP_TASKS_PER_NODE, such as "2(x3),1", and the number of this node."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]


def _first_host(environment: Mapping[str, str]) -> str | None:
    """Of the Slurm job."""
    nodes = environment.get("SLURM_STEP_NODELIST")
    if not nodes or shutil.which("scontrol") is None:
        return None
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown[0] if shown else None


def own_launch() -> Launch:
    """Of this process."""
    return launch_of(os.environ, os.getppid())
