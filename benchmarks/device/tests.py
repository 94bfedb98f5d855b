"""The tests that need a GPU, which skip elsewhere."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from device.devices import Device
from device.results import Results
from lib.processes import ROOT

__all__ = ["run"]

JOBS = 6  # pytest's; the rest of the cores compare bits at the same time
PRINTED = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")


def command() -> list[str]:
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "needs_cuda" in p.read_text()]
    pytest = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    pytest += ["--rootdir", str(ROOT), "-m", "cuda", "-v", "-rfE", "--tb=short", "-W", "default"]
    pytest += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) > 4:
        pytest += ["-p", "xdist.plugin", "-n", str(JOBS)]
    return [*pytest, *map(str, sorted(files))]


def run(device: Device, results: Results) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # What other packages plug into pytest may warn, or take part.
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:  # not the checkout, which would be imported
        path = Path(folder) / "log"
        # Not a pipe, which pytest's workers may keep open.
        with path.open("w") as log:
            process = subprocess.Popen(
                command(), cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            # First it may say what failed so far.
            for patience, number in ((results.left() - 20, signal.SIGINT), (15, signal.SIGKILL)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(5.0, patience))
                if process.poll() is None:
                    process.send_signal(number)
        code, lines = process.wait(), path.read_text(errors="replace").splitlines()
    print("\n".join(lines), flush=True)
    counts = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
    said = []
    for line in lines:
        if line.startswith(("FAILED ", "ERROR ")) and "::" in line:
            said.append(line.strip()[:300])
        elif "::" in line and (found := PRINTED.search(line)):
            counts[found[1]] += 1
    last = next((line.strip("= ") for line in reversed(lines) if line.strip("= ")), "")
    for line in said[:30]:
        results.failure(line)
    results.row("Tests that need a GPU", **{k.lower(): v for k, v in counts.items()}, says=last)
    wrong = counts["FAILED"] + counts["ERROR"]
    if code not in (0, 1, 5) or not (device.dry or counts["PASSED"]):
        wrong += 1
        results.failure(f"pytest ended with exit code {code}: {last[:200]}")
    results.target("Tests that need a GPU and failed", wrong, 0, "")
