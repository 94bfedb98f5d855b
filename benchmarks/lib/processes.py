"""Ranks as processes: the commands that start them, and processes of which none is left behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
TRAINER = str(ROOT / "launch" / "train_ddp.py")
MPIEXEC = str(Path(sys.prefix) / "bin" / "mpiexec")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

Process = subprocess.Popen[str]


def execute(command: Sequence[str], environment: Mapping[str, str] = ONE_THREAD) -> None:
    """Run a command with these variables in addition to those of this process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run(command, env=os.environ | environment, check=True)


def torchrun(ranks: int) -> list[str]:
    """What to put in front of a script and its arguments."""
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, "--standalone", f"--nproc-per-node={ranks}"]


def mpirun(ranks: int) -> list[str]:
    """The same; `-m mpi4py` ends all ranks when one fails."""
    return [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mpi4py"]


def on_links(ranks: int, rate: str, *, mpi: bool = False) -> list[str]:
    """The same for ranks on emulated links of a rate like "1gbit", by launch/network.sh (root)."""
    script = str(ROOT / "launch" / "network.sh")
    if mpi:
        python = [sys.executable, "-m", "mpi4py"]
        return [script, "--mpi", str(ranks), rate, "--", *python]
    return [script, str(ranks), rate, "--", sys.executable]


# ---- Processes that may fail, hang or be killed -------------------------------------------------

_MARK = "RHTCOMM_FAULTS"


@contextmanager
def marked_processes() -> Iterator[tuple[dict[str, str], list[Process]]]:
    """An environment that marks processes, and a list of started ones, killed at the end."""
    environment = {
        **os.environ,
        **ONE_THREAD,
        _MARK: uuid.uuid4().hex,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    started: list[Process] = []
    try:
        yield environment, started
    finally:
        for pid in living(environment):
            os.kill(pid, signal.SIGKILL)
        for process in started:
            process.wait()


def start(command: list[str], environment: dict[str, str], output: IO[str]) -> Process:
    """A process in a session of its own."""
    return subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=output,
        text=True,
        start_new_session=True,
    )


def living(environment: dict[str, str], **variables: str) -> list[int]:
    """Processes that have the mark of this environment, and these variables."""
    wanted = {f"{name}={value}" for name, value in variables.items()}
    wanted.add(f"{_MARK}={environment[_MARK]}")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
        if wanted <= set(entries):
            found.append(int(folder.name))
    return found


def wait(process: Process, deadline: float, who: str) -> None:
    """Wait until `deadline` by time.monotonic().

    Raises:
        TimeoutError: the process did not end.
    """
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{who} did not end") from None


def none_left(what: str, environment: dict[str, str], but: int | None = None) -> None:
    """Give those that are ending a moment to do so.

    Raises:
        RuntimeError: marked processes live on, other than the one whose id is `but`.
    """
    for _ in range(50):
        left = set(living(environment)) - {but}
        if not left:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{what}: processes {left} are left behind")
