"""Cores, and the threads that share them."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from rhtcomm.doctor.finding import Finding
from rhtcomm.doctor.launcher import Launch

__all__ = ["Machine", "cores", "of_this_process", "threads"]

UNBIND = {
    "Open MPI": "mpiexec --bind-to none, or launch/mpirun.sh, which does that",
    "Intel MPI": "set I_MPI_PIN=0, or use launch/mpirun.sh, which does that",
    "MPICH": "mpiexec -bind-to none",
    "srun": "srun --cpu-bind=none, or more --cpus-per-task",
}


class Machine:
    """Which cores there are, and how many of them this process may use.

    Args:
        root: of the file system, for tests.

    Attributes:
        allowed: logical cores that the machine or the container has.
        affinity: those of them that this process may run on.
        limit: of a container, in cores of continuous work; None without one.
    """

    def __init__(self, root: Path = Path("/"), affinity: set[int] | None = None) -> None:
        self._root = root
        everything = set(range(os.cpu_count() or 1))
        self.allowed = self._cpuset() or everything
        if affinity is None:
            own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else everything
            affinity = set(own)
        self.affinity = affinity
        self.allowed |= affinity
        self.limit = self._quota()

    def physical(self, cores: set[int]) -> int:
        """How many of the logical cores are distinct ones; torch takes a thread for each."""
        folder = self._root / "sys/devices/system/cpu"
        siblings = {
            _read(folder / f"cpu{core}" / "topology/thread_siblings_list") or str(core)
            for core in cores
        }
        return len(siblings)

    def _cpuset(self) -> set[int]:
        for folder in self._cgroups("cpuset"):
            for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
                if text := _read(folder / name):
                    return set(_numbers(text))
        return set()

    def _quota(self) -> float | None:
        limits = []
        for folder in self._cgroups("cpu"):
            words = _read(folder / "cpu.max").split()  # version 2: "150000 100000" or "max 100000"
            words = words or [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            if all(word.isdecimal() for word in words):
                limits.append(int(words[0]) / int(words[1]))
        return min(limits, default=None)

    def _cgroups(self, controller: str) -> Iterator[Path]:
        """Folders of the control groups that this process is in, the innermost first."""
        top = self._root / "sys/fs/cgroup"
        for line in _read(self._root / "proc/self/cgroup").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and controllers == "":  # version 2
                mount = top
            elif controller in controllers.split(","):
                mount = top / controller
            else:
                continue
            inner = mount / path.lstrip("/")
            yield inner
            while inner != mount and mount in inner.parents:
                inner = inner.parent
                yield inner


def of_this_process(launch: Launch) -> list[Finding]:
    import torch

    machine = Machine()
    return [*cores(launch, machine), *threads(launch, machine, torch.get_num_threads())]


def cores(launch: Launch, machine: Machine) -> list[Finding]:
    """Whether this process may use its share of the machine."""
    have, there = len(machine.affinity), len(machine.allowed)
    ranks = launch.local_size
    share = max(1, there // ranks)
    fact = f"each rank may run on {have} of {there} cores"
    remedy = UNBIND.get(launch.name, "start it without taskset, numactl or the like")
    together = launch.local_cores
    if together is not None and together < min(ranks, there):
        fact = f"the {ranks} ranks on this machine are all bound to "
        fact += "one core" if together == 1 else f"the same {together} cores"
        fact += f", of {there}"
        found = [Finding("problem", "cores", fact, f"do not bind: {remedy}")]
    elif have < share:
        fact += f", though {share} are its share"
        found = [Finding("problem", "cores", fact, f"do not bind: {remedy}")]
    elif have == 1 < there:
        fact = "each rank is bound to one core, "
        fact += "which training and the hook's worker thread must share"
        found = [Finding("remark", "cores", fact, f"do not bind: {remedy}")]
    else:
        found = [Finding("ok", "cores", fact)]
    if machine.limit is not None and machine.limit < have:
        fact = f"a control group limits it to {machine.limit:g} cores of work, fewer than it sees"
        least = max(1, math.floor(machine.limit / ranks))
        remedy = f"OMP_NUM_THREADS={least}, or raise the container's limit of cores"
        found.append(Finding("remark", "cores", fact, remedy))
    return found


def threads(launch: Launch, machine: Machine, torch_threads: int) -> list[Finding]:
    """Whether torch's threads fit the cores of this rank."""
    ranks = launch.local_size
    limit = math.inf if machine.limit is None else max(1, math.floor(machine.limit / ranks))

    def share(own: int, there: int) -> int:
        return int(min(own, max(1, there // ranks), limit))

    most = share(len(machine.affinity), len(machine.allowed))
    usual = share(machine.physical(machine.affinity), machine.physical(machine.allowed))
    fact = f"{_count(ranks, 'rank')} on this machine with {_count(torch_threads, 'thread')}"
    fact += " each" if ranks > 1 else ""
    if torch_threads > most:
        fact += f", but only {_count(most, 'core')} for each rank: the threads wait for each other"
        return [Finding("remark", "threads", fact, f"set OMP_NUM_THREADS={usual}")]
    if torch_threads < usual:
        fact += f", though each rank has {usual} cores: some stay idle"
        remedy = f"set OMP_NUM_THREADS={usual}, unless your program calls torch.set_num_threads"
        return [Finding("remark", "threads", fact, remedy)]
    return [Finding("ok", "threads", fact)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _numbers(text: str) -> Iterator[int]:
    """ "0-2,5" -> 0, 1, 2, 5"""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
