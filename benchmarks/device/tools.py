"""compute-sanitizer on a small case, and ncu's counters of the two main kernels."""

import contextlib
import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from device.devices import Device
from device.results import Results
from device.small import COUNTED, ENDED

__all__ = ["counters", "sanitizer"]

GPU = str(Path(__file__).parents[1] / "gpu.py")
PLACES = ("/usr/local/cuda/bin", *map(str, Path("/opt/nvidia/nsight-compute").glob("*")))
# Names among ncu's raw metrics, and what they are called here; those it lacks are left out.
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots, %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue active, %",
    "smsp__inst_executed.sum": "instructions of warps",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "ALU pipe, %",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": "FMA pipe, %",
    "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active": "LSU pipe, %",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "XU pipe, %",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed": "L1 wavefronts, %",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts, shared",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "L1, %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2, %",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, %",
    "dram__bytes_read.sum": "DRAM read",
    "dram__bytes_write.sum": "DRAM written",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stall: memory",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio": "stall: shared",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": "stall: fixed latency",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": "stall: pipe",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "stall: barrier",
    "smsp__average_warps_issue_stalled_mio_throttle_per_issue_active.ratio": "stall: MIO",
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio": "stall: LG",
}


def find(tool: str) -> str | None:
    return shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def watch(
    tool: str, options: list[str], what: str, device: Device, seconds: float
) -> tuple[int | None, str]:
    """Run a function of small.py under a tool. Returns the exit code, or None, and output."""
    small = [GPU, "--part", f"device.small:{what}", "--rows", os.devnull, "--seconds", "60"]
    environment = dict(os.environ)
    if what == "sanitize":  # it sees no harm within the memory that torch's allocator keeps
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [tool, *options, sys.executable, *small, *["--dry-run"] * device.dry]
    # Not a pipe, which what the tool has started may keep open.
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=max(1.0, seconds))
        process.kill()
        file.seek(0)
        output = file.read()
    print(output, flush=True)
    return code, output


def sanitizer(device: Device, results: Results) -> None:
    tool = find("compute-sanitizer")
    if tool is None:
        results.say("compute-sanitizer is not here, so nothing was checked by it")
        return
    checks = ("memcheck", "racecheck")
    for i, check in enumerate(checks):
        options = ["--tool", check, "--error-exitcode", "9", "--report-api-errors", "no"]
        share = (results.left() - 3) / (len(checks) - i)
        code, output = watch(tool, options, "sanitize", device, share)
        lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=====")]
        said = [line for line in lines if "SUMMARY" in line or "not supported" in line]
        row: dict[str, object] = {"tool": check, "said": "; ".join(said)[:150]}
        if code is None:
            row["found"] = "it did not end in its time"
        elif code == 0 and ENDED in output:
            row["found"] = "nothing"
        elif code == 9:
            row["found"] = "errors"
            results.failure(f"{check}: {'; '.join(lines[1:6])}")
        else:
            row["found"] = f"could not run: exit code {code}"
        results.row("compute-sanitizer on a small case", **row)


def counters(device: Device, results: Results) -> None:
    tool = find("ncu")
    if tool is None:
        results.say("ncu is not here, so no counters were read")
        return
    count = 2 * len(COUNTED)
    options = ["--clock-control", "none", "--set", "full"]
    options += ["--kernel-name", "regex:(en|de)code_block", "--launch-skip", str(count)]
    options += ["--launch-count", str(count), "--csv", "--page", "raw"]
    code, output = watch(tool, options, "count", device, results.left() - 3)
    kernels = rows_of(output)
    if not kernels:
        results.say(f"ncu read no counters (exit code {code})")
        return
    names = [f"k = {k}, {str(dtype).removeprefix('torch.')}" for k, dtype in COUNTED]
    cases = [f"{way}, {name}" for name in names for way in ("encode", "decode")]
    for metric, name in COUNTERS.items():
        if metric in kernels[0]:
            found = {case: row.get(metric, "") for case, row in zip(cases, kernels, strict=False)}
            unit = kernels[0].get(f"unit of {metric}", "")
            results.row("Counters of ncu, 25 MiB, b = 4", counter=name, unit=unit, **found)


def rows_of(output: str) -> list[dict[str, Any]]:
    """A dictionary a kernel, from ncu's CSV: a line of names, one of units, one for each kernel."""
    lines = output.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID","Process ID"')]
    if not starts:
        return []
    table = list(csv.reader(io.StringIO("\n".join(lines[starts[0] :]))))
    table = [row for row in table if len(row) == len(table[0])]
    if len(table) < 3:
        return []
    names, units, *rows = table
    units_by_name = {f"unit of {name}": unit for name, unit in zip(names, units, strict=True)}
    return [{**units_by_name, **dict(zip(names, row, strict=True))} for row in rows]
