"""Functions called in processes of their own, which may crash or hang without harm to others.

A CUDA error poisons its process: every later call fails too. So a child that failed in any way
other than by an assertion is replaced by a new one.
"""

import contextlib
import multiprocessing as mp
import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

__all__ = ["Failed", "each", "together"]

_SPAWN = mp.get_context("spawn")  # CUDA survives no fork


@dataclass(frozen=True)
class Failed:
    """How a call ended, where it did not return."""

    reason: str  # one line
    trace: str = ""
    poisoned: bool = True
    """Whether its process should not be used again."""


class Child:
    """A process that calls one function after the other."""

    def __init__(self, threads: int) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, threads), daemon=True)
        self._process.start()
        theirs.close()
        self.deadline = 0.0

    def call(self, seconds: float, function: Callable[..., Any], *args: object) -> None:
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # it has died, as `outcome` will tell
            self.connection.send_bytes(pickle.dumps((function, args)))

    def outcome(self) -> Any:
        """What the call returned, or `Failed`."""
        if not self.connection.poll(max(0.0, self.deadline - time.monotonic())):
            return Failed("it did not end in its time")
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._process.join(5)
            return Failed(f"its process ended with exit code {self._process.exitcode}")

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            outcome = function(*args)
        except AssertionError as error:
            outcome = Failed(_line(error), traceback.format_exc(), poisoned=False)
        except BaseException as error:
            outcome = Failed(_line(error), traceback.format_exc())
        connection.send_bytes(pickle.dumps(outcome))  # `send` would put tensors in shared memory


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def each(
    function: Callable[..., Any],
    tasks: Iterable[tuple[Any, ...]],
    *,
    children: int,
    threads: int,
    seconds: float,
    left: Callable[[], float],
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Call function(*task) for each task, in so many processes; yields tasks and outcomes.

    Args:
        threads: of each process.
        seconds: of one call at most.
        left: seconds in all; none is begun, and those that run are ended, when there are none.
    """
    waiting = iter(tasks)
    busy: dict[Any, tuple[Child, tuple[Any, ...]]] = {}

    def give(child: Child | None) -> None:
        task = next(waiting, None) if left() > 0 else None
        if task is None:
            if child is not None:
                child.end()
            return
        child = child or Child(threads)
        child.call(seconds, function, *task)
        busy[child.connection] = child, task

    try:
        for _ in range(children):
            give(None)
        while busy and left() > 0:
            now = time.monotonic()
            ready = set(wait(list(busy), 0.2))
            ready |= {key for key, (child, _) in busy.items() if child.deadline < now}
            for key in ready:
                child, task = busy.pop(key)
                outcome = child.outcome()
                yield task, outcome
                if isinstance(outcome, Failed) and outcome.poisoned:
                    child.end()
                    give(None)
                else:
                    give(child)
    finally:
        for child, _ in busy.values():
            child.end()


def together(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], *, threads: int, seconds: float
) -> list[Any]:
    """Call all functions at once, each in a process of its own: ranks that wait for each other."""
    children = [Child(threads) for _ in calls]
    try:
        for child, (function, args) in zip(children, calls, strict=True):
            child.call(seconds, function, *args)
        outcomes = []
        for child in children:
            outcomes.append(child.outcome())
            if isinstance(outcomes[-1], Failed):  # the others wait for it
                soon = time.monotonic() + 5
                for other in children:
                    other.deadline = min(other.deadline, soon)
        return outcomes
    finally:
        for child in children:
            child.end()
