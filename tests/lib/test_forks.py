"""Processes that a server forks, as far as the tests take them for those of `python -c`."""

import os
import signal
import subprocess
import time
from pathlib import Path

import forks
import pytest
from harness import limit


def test_a_process_is_fresh_and_has_what_it_was_given() -> None:
    program = """
import atexit, ctypes, sys, warnings
atexit.register(print, "atexit")
left = [name for name in sys.modules if name.split(".")[0] in ("rhtcomm", "triton", "harness")]
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
print("torch" in sys.modules, left, sys.argv[1:], getenv(b"GIVEN"), getenv(b"HOME"), __name__)
try:
    warnings.warn("now")
except UserWarning:
    print("strict", file=sys.stderr)
"""
    for strict, said in ((True, "strict\n"), (False, "UserWarning: now")):
        process = forks.start(program, {"GIVEN": "this"}, "a", "b c", strict=strict)
        done = process.wait(limit(60))
        assert done.returncode == 0, done.stderr
        facts = "True [] ['a', 'b c'] b'this' None __main__"
        assert done.stdout.splitlines() == [facts, "atexit"]
        assert said in done.stderr


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import sys; sys.exit('an end')", 1, "an end\n"),
        ("import os; os._exit(9)", 9, ""),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", -signal.SIGKILL, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_how_a_process_ended(program: str, code: int, said: str) -> None:
    done = forks.start(program, os.environ).wait(limit(60))
    assert done.returncode == code
    assert done.stderr.endswith(said) if said else not done.stderr


def test_a_process_that_does_not_end_is_killed(tmp_path: Path) -> None:
    program = """
import os, sys, time
print("begun", flush=True)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(1000)
"""
    written, deadline = tmp_path / "pid", time.monotonic() + limit(60)
    process = forks.start(program, os.environ, str(written))
    while not written.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired) as late:
        process.wait(0.1)
    assert late.value.output == "begun\n"
    while lives(int(written.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_run_at_the_same_time(tmp_path: Path) -> None:
    program = """
import os, sys, time
open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
"""
    files = [str(tmp_path / name) for name in ("a", "b")]
    processes = [forks.start(program, os.environ, *order) for order in (files, files[::-1])]
    assert [process.wait(limit(60)).returncode for process in processes] == [0, 0]
