"""Real processes for tests that need ranks.

Importing torch takes seconds, so `Ranks` keeps its processes from one case to the next, and gives
each case a new process group: what one case broke, the next does not see.
"""

import contextlib
import faulthandler
import importlib.util
import inspect
import multiprocessing as mp
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import forks
import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

__all__ = [
    "ROOT",
    "Failure",
    "Ranks",
    "call_in_fresh_process",
    "in_fresh_process",
    "limit",
    "load_module",
    "reserved_port",
    "run_program",
]

ROOT = Path(__file__).parents[2]  # of the repository
_HOST = "127.0.0.1"
_STRETCH = "RHTCOMM_TEST_STRETCH"  # the factor, for the processes that a test starts
_INHERITED = _STRETCH in os.environ
_WHERE = signal.SIGUSR1  # a process that gets it prints the stacks of its threads


def limit(seconds: float) -> float:
    """`seconds`, stretched by how busy the machine is: the time after which a test gives up.

    Every time limit that guards against a hang comes from here. A test that asserts that something
    ends at its own timeout does not. The factor is twice the load for each processor (the load
    average lags behind), at least 1, times RHTCOMM_TEST_PATIENCE (default 1), for machines whose
    load does not tell. It never falls within a test run, and processes keep the one that they were
    started with, so a limit inside another one stays below it.
    """
    if not _INHERITED:
        before = float(os.environ.get(_STRETCH, 0))
        os.environ[_STRETCH] = repr(max(before, _stretch()))
    return seconds * float(os.environ[_STRETCH])


def _stretch() -> float:
    patience = os.environ.get("RHTCOMM_TEST_PATIENCE") or "1"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return float(patience) * max(1.0, 2 * load / (os.cpu_count() or 1))


@dataclass(frozen=True)
class Failure:
    """How a rank failed: the name of the exception's type, its message, and the traceback."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        return cls(type(error).__name__, str(error), traceback.format_exc())


@dataclass(frozen=True)
class _Worker:
    process: mp.process.BaseProcess
    connection: Connection  # sends tasks, receives outcomes; both pickled
    log: Path  # what the process wrote to stdout and stderr

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Ranks:
    """Processes that run functions as the ranks of a Gloo group, with one torch thread each.

    A function is module-level and takes (rank, world_size, *args); arguments and results are
    pickled. Warnings are errors in the processes, as they are in the test run.
    """

    def __init__(self) -> None:
        # This process listens, so no port is chosen before it is bound.
        self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory()
        self._workers: list[_Worker] = []
        self._cases = 0
        self._spawned = 0

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._kill()
        self._folder.cleanup()

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60
    ) -> list[Any]:
        """What each rank returned; fails the test if one raised, or after `limit(timeout)`."""
        outcomes = self.outcomes(function, world_size, *args, timeout=timeout)
        failed = {rank: o.traceback for rank, o in enumerate(outcomes) if isinstance(o, Failure)}
        if failed:
            text = "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
            pytest.fail(text, pytrace=False)
        return outcomes

    def outcomes(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60
    ) -> list[Any]:
        """What each rank returned, or the `Failure` that it ended with."""
        timeout = limit(timeout)
        while len(self._workers) < world_size:
            self._workers.append(self._spawn())
        self._cases += 1
        workers = self._workers[:world_size]
        written = [worker.log.stat().st_size for worker in workers]
        outcomes: list[Any] = []
        deadline = time.monotonic() + timeout
        try:
            for rank, worker in enumerate(workers):
                group = _Group(self._store.port, f"case {self._cases}", rank, world_size, timeout)
                task = (inspect.getfile(function), function.__name__, group, args)
                worker.connection.send_bytes(pickle.dumps(task))
            for rank, worker in enumerate(workers):
                if not worker.connection.poll(max(0.0, deadline - time.monotonic())):
                    self._print_stacks()
                    raise TimeoutError(f"rank {rank} did not end within {timeout:.0f} s")
                outcomes.append(pickle.loads(worker.connection.recv_bytes()))
        except BaseException as error:
            self._kill()  # what the ranks still do would be taken for the outcome of the next case
            if not isinstance(error, (EOFError, OSError)):
                raise
            printed = "".join(
                f"\nrank {rank}, exit code {worker.process.exitcode}, printed:\n"
                + worker.log.read_bytes()[start:].decode(errors="replace")
                for rank, (worker, start) in enumerate(zip(workers, written, strict=True))
            )
            pytest.fail(f"{function.__name__}: {error!r}{printed}", pytrace=False)
        return outcomes

    def _spawn(self) -> _Worker:
        self._spawned += 1
        log = Path(self._folder.name) / f"{self._spawned}.log"
        log.touch()
        spawn = mp.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, str(log)), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, log)

    def _print_stacks(self) -> None:
        """Have all ranks print where their threads are, into their logs."""
        for worker in self._workers:
            assert worker.process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, _WHERE)
        time.sleep(1)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()


@dataclass(frozen=True)
class _Group:
    port: int
    case: str
    rank: int
    world_size: int
    timeout: float

    def __enter__(self) -> "_Group":
        store = PrefixStore(self.case, TCPStore(_HOST, self.port, is_master=False))
        timeout = timedelta(seconds=self.timeout)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
        )
        # A rank that leaves while others connect would fail one of them, and the rest would wait.
        if store.add("connected", 1) == self.world_size:
            store.set("all are", "connected")
        store.wait(["all are"], timeout)
        return self

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _serve(connection: Connection, log: str) -> None:
    """Run tasks until the other end is gone."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    faulthandler.register(_WHERE, sys.stderr)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # As a thread's first work on CUDA is a product, which autograd's may be.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA")
    while True:
        try:
            file_name, name, group, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            with group:
                function = getattr(load_module(file_name), name)
                outcome = pickle.dumps(function(group.rank, group.world_size, *args))
        except BaseException as error:
            outcome = pickle.dumps(Failure.of(error))
        connection.send_bytes(outcome)


def _end_with_parent() -> None:
    """A rank stuck in a collective would outlive a test run that was killed."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@cache
def load_module(file: str) -> ModuleType:
    """A test or script by its file: in pytest's importlib mode its name cannot be imported."""
    name = Path(file).stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == file:
        return known  # one of tests/lib, whose classes would otherwise exist twice
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port for a program that takes a number; nobody else is given it meanwhile.

    Stores reuse addresses, as this socket does, and so can have the port of one that does not
    listen.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((_HOST, 0))
        yield probe.getsockname()[1]


def in_fresh_process(program: str, **environment: str) -> list[str]:
    """The lines that it prints. Of the environment it has no choice of kernels but these."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RHTCOMM_KERNELS", "RHTCOMM_CPU")}
    if "TRITON_INTERPRET" in environment:
        program = f"__import__('interpreter').mend()\n{program}"
    done = forks.start(program, {**kept, **environment}).wait(limit(180))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def call_in_fresh_process(
    function: Callable[..., Any], *args: Any, **environment: str
) -> list[str]:
    """The lines that a function of a module prints, called with plain arguments."""
    module = f"__import__('harness').load_module({inspect.getfile(function)!r})"
    arguments = ", ".join(map(repr, args))
    return in_fresh_process(f"{module}.{function.__name__}({arguments})", **environment)


def run_program(
    source: str, world_size: int, timeout: float = 60
) -> list[subprocess.CompletedProcess[str]]:
    """Run a program as the ranks that torchrun would start; for what happens as processes end.

    Fails the test after `limit(timeout)`.
    """
    timeout = limit(timeout)
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world_size),
    }
    if sys.platform == "linux":
        # Where the host's name cannot be resolved, Gloo says on stderr that it takes this one.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        forks.start(source, environment | {"RANK": str(rank)}, imported="torch._dynamo")
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + timeout
    late = False
    finished = []
    for process in processes:
        try:
            finished.append(process.wait(max(0.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired as error:
            late = True
            killed = -signal.SIGKILL
            finished.append(
                subprocess.CompletedProcess(error.cmd, killed, error.output, error.stderr)
            )
    if late:
        pytest.fail(f"the program did not end within {timeout:.0f} s: {finished}")
    return finished
