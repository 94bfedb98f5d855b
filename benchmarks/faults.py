"""What the ranks of a job say when one of them fails, and how long they take.

    python benchmarks/faults.py    (writes results/faults.md; about a minute)

Three ranks, or two nodes of two, train a small model with the hook and a timeout of `TIMEOUT`
seconds. In mid-exchange, between two chunks of a payload, rank 1 fails in the way of a scenario.
Seconds are from then until the error comes out of the others' backward pass.
tests/hooks/test_faults.py runs the same scenarios.
"""

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lib.processes import marked_processes, mpirun, none_left, start, wait
from lib.report import RESULTS, heading, table_lines
from rhtcomm import HierarchicalCommunicator, MPICommunicator
from rhtcomm.codec import Coder
from rhtcomm.communicators import Communicator
from rhtcomm.communicators.sockets import SocketCommunicator
from rhtcomm.hooks import RHTState, rht_hook

TIMEOUT = 5  # seconds that the hook's exchanges wait
VICTIM = 1
LIMIT = 60  # seconds for the start of Python, and all the rest
# Of the model's only layer, without a bias: six chunks of the longest that a bucket is split into,
# and three with two levels, where each rank of a node sends half.
SHAPE = (2048, 6 * 3 * (1 << 18) // 2048)


@dataclass(frozen=True)
class Scenario:
    what: str  # is done
    timeout: float = TIMEOUT
    world_size: int = 3


SCENARIOS = {
    "killed": Scenario("rank 1 is killed (SIGKILL) in mid-exchange"),
    "stopped": Scenario("rank 1 stops (SIGSTOP) in mid-exchange"),
    # The others must not wait for a rank that failed but keeps running: the timeout exceeds LIMIT.
    "raises": Scenario("encode raises on rank 1, which keeps running", timeout=1000),
    "raises, two levels": Scenario(
        "encode raises on rank 1 of 2 nodes x 2 ranks, which keeps running",
        timeout=1000,
        world_size=4,
    ),
    "no hook": Scenario("rank 1 registers no hook"),
    "configured differently": Scenario("rank 1 has bits=3, the others bits=4"),
}
MPI_SCENARIOS = {
    "abort": Scenario("rank 1 of an MPI job calls MPI_Abort in mid-exchange"),
    "raises": Scenario("encode raises on rank 1 of an MPI job"),
}


@dataclass(frozen=True)
class Survivor:
    """How a rank that did not fail itself ended."""

    rank: int
    exit_code: int
    seconds: float  # from the fault to the error
    printed: str


# ---- One rank ---------------------------------------------------------------------------------


def rank_program(name: str, mpi: bool) -> None:
    """Train until something fails; runs in a process of its own."""
    torch.set_num_threads(1)
    if mpi:
        from mpi4py import MPI

        os.environ |= {"RANK": str(MPI.COMM_WORLD.rank), "WORLD_SIZE": str(MPI.COMM_WORLD.size)}
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(*SHAPE, bias=False))
    scenario = (MPI_SCENARIOS if mpi else SCENARIOS)[name]
    is_victim = rank == VICTIM
    custom: Communicator | HierarchicalCommunicator | None = None
    if mpi:
        custom = MPICommunicator(timeout=scenario.timeout)
    elif name == "raises, two levels":
        custom = two_levels(rank, timedelta(seconds=scenario.timeout))
    state = RHTState(
        3 if is_victim and name == "configured differently" else 4,
        algorithm="all_gather",
        timeout=None if custom else timedelta(seconds=scenario.timeout),
        communicator=custom,
    )
    del custom
    if not (is_victim and name == "no hook"):
        model.register_comm_hook(state, rht_hook)
    if is_victim:
        inject(name)
    torch.manual_seed(rank)
    try:
        for _ in range(1000):
            model(torch.randn(8, SHAPE[0])).square().mean().backward()
    except Exception:
        print(f"error at {time.monotonic()}", flush=True)
        if is_victim and not mpi:
            time.sleep(LIMIT)
        raise


def two_levels(rank: int, timeout: timedelta) -> HierarchicalCommunicator:
    """Two nodes of two ranks; nothing else refers to the groups."""
    within, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]], timeout=timeout)
    between, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]], timeout=timeout)
    return HierarchicalCommunicator(within, between)


def inject(name: str) -> None:
    """Make this rank fail in the third chunk of the second payload, or when it encodes that."""

    def fault() -> None:
        print(f"fault at {time.monotonic()}", flush=True)
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if name == "abort":
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(3)
        if name in ("raises", "raises, two levels"):
            raise ZeroDivisionError("injected failure")

    if name in ("no hook", "configured differently"):
        fault()
        return
    owner, method, call = {
        "raises": (Coder, "encode", 6 + 3),
        "raises, two levels": (Coder, "encode", 3 + 2),
        "abort": (MPICommunicator, "start_all_gather", 1 + 6 + 3),
    }.get(name, (SocketCommunicator, "start_all_gather", 2 + 6 + 3))  # a greeting and a comparison
    original, calls = getattr(owner, method), 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            fault()
        return original(*args, **kwargs)

    setattr(owner, method, counted)


# ---- All ranks --------------------------------------------------------------------------------


def run(name: str) -> list[Survivor]:
    """The survivors of a scenario.

    Raises:
        TimeoutError: a survivor did not end within `LIMIT`.
        RuntimeError: the fault did not happen, or a process other than the failed rank is left.
    """
    world_size = SCENARIOS[name].world_size
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with marked_processes() as (environment, started), tempfile.TemporaryDirectory() as folder:
        environment |= place_of(store) | {"WORLD_SIZE": str(world_size)}
        for rank in range(world_size):
            with (Path(folder) / str(rank)).open("w") as output:
                command = [sys.executable, __file__, "--rank-of", name]
                started.append(start(command, environment | {"RANK": str(rank)}, output))
        deadline = time.monotonic() + LIMIT
        for rank, process in enumerate(started):
            if rank != VICTIM:
                wait(process, deadline, f"rank {rank}, scenario {name!r}")
        none_left(name, environment, but=started[VICTIM].pid)
        printed = [(Path(folder) / str(rank)).read_text() for rank in range(world_size)]
    fault = moment("fault", printed[VICTIM])
    return [
        Survivor(
            rank,
            started[rank].returncode,
            moment("error", printed[rank]) - fault,
            printed[rank],
        )
        for rank in range(world_size)
        if rank != VICTIM
    ]


def run_mpi(name: str) -> tuple[int, str]:
    """The exit code of mpiexec, and what it and the ranks printed; raises as `run` does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with marked_processes() as (environment, started), tempfile.TemporaryFile("w+") as output:
        environment |= place_of(store)
        process = start([*mpirun(2), __file__, "--mpi-rank-of", name], environment, output)
        started.append(process)
        wait(process, time.monotonic() + LIMIT, f"mpiexec, scenario {name!r}")
        none_left(name, environment)
        output.seek(0)
        return process.returncode, output.read()


def place_of(store: dist.TCPStore) -> dict[str, str]:
    """Variables that let ranks meet at a store of this process."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def moment(event: str, printed: str) -> float:
    for line in printed.splitlines():
        if line.startswith(f"{event} at "):
            return float(line.split()[-1])
    raise RuntimeError(f"no {event} happened: {printed}")


def shorten(error: str) -> str:
    """Without the folders in which torch was built, and what wraps the hook's own words."""
    error = re.sub(r"\[?/\S*/(gloo/\S*\])", r"[\1", error.strip())
    return re.sub(
        r"Got the following error when running the callback: (RuntimeError: )?", "", error
    )


def rows() -> Iterator[list[str]]:
    for name, scenario in SCENARIOS.items():
        for survivor in run(name):
            error = [line for line in survivor.printed.splitlines() if "Error: " in line][-1]
            what = f"{scenario.what}; timeout {scenario.timeout:g} s"
            ended = [f"{survivor.seconds:.1f}", str(survivor.exit_code), shorten(error)]
            yield [what, str(survivor.rank), *ended]
    for name, scenario in MPI_SCENARIOS.items():
        code, printed = run_mpi(name)
        errors = [line for line in printed.splitlines() if "Error: " in line or "Abort" in line]
        yield [scenario.what, "mpiexec", "", str(code), shorten(" ".join(errors))]


def main() -> None:
    lines = [f"{heading()}\n3 or 4 ranks on loopback\n"]
    header = ["fault", "rank", "seconds", "exit code", "last line printed"]
    for line in table_lines(header, rows(), left=range(len(header))):
        print(line, flush=True)
        lines.append(line)
    (RESULTS / "faults.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] in (["--rank-of"], ["--mpi-rank-of"]):
        rank_program(sys.argv[2], mpi=sys.argv[1] == "--mpi-rank-of")
    else:
        main()
