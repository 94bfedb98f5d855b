"""Fresh Python processes that need not import torch, which takes each of them more than a second.

A server imports torch, and nothing that is tested, and forks a process for each program. (Only on
Linux: elsewhere libraries do not survive it.)
"""

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, Protocol

__all__ = ["Process", "serve", "start"]

_LARGEST = 1 << 18  # bytes of a request


class Process(Protocol):
    def wait(self, timeout: float) -> "subprocess.CompletedProcess[str]":
        """What it printed, and its exit code.

        Raises:
            subprocess.TimeoutExpired: it did not end in time, and was killed; with what it printed.
        """


def start(
    program: str,
    environment: Mapping[str, str],
    *arguments: str,
    strict: bool = True,
    imported: str = "torch.distributed",
) -> Process:
    """Run a program in a fresh process, as `python -c` would, with -W error where it is strict.

    But OMP_NUM_THREADS is 1, sys.path is that of the tests, and so is what torch reads from the
    environment as it is imported.

    Args:
        imported: torch, or one of its modules that the program will need and that is slow.
    """
    command = [sys.executable, *(["-W", "error"] if strict else []), "-c", program, *arguments]
    environment = {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if sys.platform != "linux":
        return _Started(command, environment)
    request = {"program": program, "arguments": arguments, "strict": strict}
    return _Forked(command, request | {"environment": environment}, _server(imported))


class _Started:
    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        process = self._process
        try:
            printed = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            process.kill()
            late.output, late.stderr = process.communicate()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, *printed)


class _Forked:
    def __init__(self, command: list[str], request: dict[str, Any], server: socket.socket) -> None:
        self._command = command
        self._output, self._errors = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self._status, theirs = os.pipe()  # brings the process's id, and then its exit code
        files = [self._output.fileno(), self._errors.fileno(), theirs]
        try:
            socket.send_fds(server, [json.dumps(request).encode()], files)
        finally:
            os.close(theirs)
        self._pid = self._next_number(None)

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        try:
            code = self._next_number(time.monotonic() + timeout)
            return subprocess.CompletedProcess(self._command, code, *self._printed())
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(self._command, timeout, *self._printed()) from None
        finally:
            os.close(self._status)
            self._output.close()
            self._errors.close()

    def _next_number(self, deadline: float | None) -> int:
        text = b""
        while not text.endswith(b" "):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._status], [], [], left)[0]:
                raise TimeoutError
            octet = os.read(self._status, 1)
            assert octet, "the server of forks has ended"
            text += octet
        return int(text)

    def _printed(self) -> list[str]:
        return [file.seek(0) or file.read() for file in (self._output, self._errors)]


@cache
def _server(imported: str) -> socket.socket:
    """Takes requests; it ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = "exec(compile(__import__('forks').serve(), '<string>', 'exec'))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs.fileno()), imported],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        pass_fds=[theirs.fileno()],
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# In the server ------------------------------------------------------------------------------------


def serve() -> str:
    """Fork a process for each request; returns, in that process, the program that it is to run."""
    server = socket.socket(fileno=int(sys.argv[1]))
    import_module(sys.argv[2])
    gc.collect()
    gc.freeze()  # or each process would touch, and so copy, all objects as it ends
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        message, files, *_ = socket.recv_fds(server, _LARGEST, 3)
        if not message:
            sys.exit()
        if _fork() == 0:
            break
        for file in files:
            os.close(file)
    server.close()
    return _become(json.loads(message), *files)


def _become(request: dict[str, Any], output: int, errors: int, status: int) -> str:
    pid = _fork()
    os.write(status, b"%d " % pid) if pid else os.close(status)
    if pid:  # the server waits for requests alone
        os.write(status, b"%d " % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    for file, stream in ((output, 1), (errors, 2)):
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[1:] = request["arguments"]
    if request["strict"]:
        warnings.simplefilter("error")
    program: str = request["program"]
    return program


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python 3.12, where NumPy has threads
        return os.fork()
