"""benchmarks/gpu.sh on a CPU: what it promises for the day when there is a GPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import ROOT, limit
from interpreter import needs_triton

SCRIPT = str(ROOT / "benchmarks" / "gpu.sh")
DRIVER = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run"]
# What each part must have found: tables, or else a sentence.
TABLES = {
    "machine": ["Clocks"],
    "tests": ["Tests that need a GPU"],
    "bits": ["Codecs with all bits of the CPU"] * 2,
    "ahead": [],
    "codec": [
        "QUIC-FL, the kernels alone",
        "Clocks",
        "The transform alone, without signs, 1 GiB read and written",
        "The cost model with these times of a chunk, 50 us a message, a bucket of 25 MiB",
        "Whole calls for 25 MiB, b = 4, with headers, us of the device",
        "Variants of the launch, b = 4, 1 GiB, share of the roofline",
        "Other blocks, b = 4, k = 2, 1 GiB of float32, warps by measurement",
    ],
    "waits": ["Buckets of the hook between two ranks in one process"] * 5,
    "streams": ["Training with delays: replicas, and buckets against the CPU"] * 2,
    "memory": ["Device memory of a step beyond what was in use before"] * 6,
    "sanitizer": [],
    "more": ["Codecs with all bits of the CPU"],
    "training": ["The demo's model, 20,576 parameters, all ranks on this device"],
    "counters": [],
}


def read(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "gpu.json").read_text())
    assert content["dry_run"]
    return {part["name"]: part for part in content["parts"]}


def rows(part: dict[str, Any], table: str) -> list[dict[str, Any]]:
    return [entry["row"] for entry in part["found"] if entry.get("table") == table]


@needs_triton
def test_a_dry_run_goes_through_all_parts(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, "--dry-run", "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=limit(400),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = read(tmp_path / "out")
    assert list(parts) == list(TABLES)
    for name, tables in TABLES.items():
        assert parts[name]["outcome"] == "done", (name, parts[name], done.stdout)
        for table in set(tables):
            assert len(rows(parts[name], table)) >= tables.count(table), (name, table)
    sizes = rows(parts["codec"], "QUIC-FL, the kernels alone")
    assert {(row["size"], row["dtype"], row["k"]) for row in sizes} >= {
        (size, dtype, k)
        for size in ("1 GiB", "25 MiB")
        for dtype in ("float32", "bfloat16")
        for k in (1, 2)
    }
    assert all(row["equal"] for row in rows(parts["streams"], TABLES["streams"][0]))
    report = (tmp_path / "out" / "gpu.md").read_text()
    assert report.startswith("# DRY RUN on a CPU: the clock is made up")
    assert not re.search(r": (met|missed)", report), "targets are neither met nor missed"
    assert str(tmp_path) not in report
    short = done.stdout.partition("DRY RUN")[2].splitlines()
    assert 20 < len(short) <= 40
    assert not any(line.startswith("!") for line in short)


def parts_in(folder: Path) -> dict[str, str]:
    """Some that end badly after a row; the environment in which they are found."""
    folder.mkdir()
    row = "def run(device, results):\n    results.row('a table', number=17)\n"
    for name, end in {
        "raises": "raise ValueError('this part is wrong')",
        "dies": "import os; os.kill(os.getpid(), 9)",
        "hangs": "import time; time.sleep(1000)",
    }.items():
        (folder / f"{name}.py").write_text(f"{row}    {end}\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


@needs_triton
def test_a_part_that_ends_badly_is_reported_and_the_others_still_run(tmp_path: Path) -> None:
    environment = parts_in(tmp_path / "modules")
    hangs = f"hangs:{limit(8):.0f}"
    done = subprocess.run(
        [*DRIVER, "--out", str(tmp_path), "--parts", "raises", "dies", hangs, "machine", "waits"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit(200),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = read(tmp_path)
    assert parts["raises"]["outcome"] == "failed, exit code 1"
    assert parts["dies"]["outcome"] == "failed, exit code -9"
    assert parts["hangs"]["outcome"].startswith("did not end within")
    for name in ("raises", "dies", "hangs"):
        assert rows(parts[name], "a table") == [{"number": 17}]
    assert parts["machine"]["outcome"] == parts["waits"]["outcome"] == "done"
    report = (tmp_path / "gpu.md").read_text()
    assert "ValueError: this part is wrong" in report
    assert "hangs.py" in report, "where it hung"
    assert "did not end within" in done.stdout


@needs_triton
def test_a_run_that_is_cut_short_leaves_what_it_found(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*DRIVER, "--out", str(tmp_path), "--parts", "hangs:1000"],
        env=parts_in(tmp_path / "modules"),
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + limit(60)
            while (
                not (tmp_path / "gpu.md").exists()
                or "17" not in (tmp_path / "gpu.md").read_text().partition("a table")[2]
            ):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            process.wait(limit(30))
        finally:
            process.kill()
    assert read(tmp_path)["hangs"]["outcome"] == "was cut short"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DRIVER[:-1], "--out", str(tmp_path / "out")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=limit(60),
    )
    assert done.returncode == 1
    assert "there is no GPU here" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_counters_of_ncu_are_read() -> None:
    from device.tools import rows_of

    output = '==PROF== Connected\n"ID","Process ID","a__b.sum"\n"","","ms"\n"0","7","1.5"\n'
    (row,) = rows_of(f"{output}\nall kernels ended\n")
    assert row == {
        **{"ID": "0", "Process ID": "7", "a__b.sum": "1.5"},
        **{"unit of ID": "", "unit of Process ID": "", "unit of a__b.sum": "ms"},
    }


def test_calls_that_crash_or_hang_harm_no_others() -> None:
    from device.children import Failed, each

    calls = {
        "1 + 1": 2,
        "1 / 0": "ZeroDivisionError: division by zero",
        "__import__('os')._exit(3)": "its process ended with exit code 3",
        "__import__('time').sleep(1000)": "it did not end in its time",
        "2 + 2": 4,
    }
    found = {
        call: outcome.reason if isinstance(outcome, Failed) else outcome
        for (call,), outcome in each(
            eval,
            [(call,) for call in calls],
            children=2,
            threads=1,
            seconds=limit(8),
            left=lambda: 1.0,
        )
    }
    assert found == calls
