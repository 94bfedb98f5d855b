"""Time of the Hadamard transform alone, beside other packages' transforms on CPU, in one thread.

    python benchmarks/transform.py --ffht FOLDER     with the sources of FFHT

Installs fht-cpu into a temporary folder. Each transform is compared with one in float64 before its
time counts. Contestants take turns, on the same rows. (pyfwht has no float32 on CPU.)
"""

import argparse
import ctypes
import importlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.report import RESULTS, heading, table
from rhtcomm.kernels import cpu

PEER = "fht-cpu==1.0.1"
ROOT = Path(__file__).resolve().parents[1]
FLOATS = 1 << 17  # of all rows: half a MiB, which stays in the second-level cache
VARIANTS = {"avx2": "rhtcomm, AVX2", "avx512vbmi": "rhtcomm, AVX-512"}

Rows = npt.NDArray[np.float32]
Transform = Callable[[Rows], object]
"""Transforms each row in place."""


def flags_of(variant: str) -> list[str]:
    """The flags by which CMakeLists.txt compiles a variant of the kernels."""
    text = (ROOT / "CMakeLists.txt").read_text()
    flags = re.search(rf"set\(flags_{variant} (.*?)\)", text)[1].split()
    inner = [flags_of(f[8:-1]) if f.startswith("${") else [f] for f in flags]
    return [flag for group in inner for flag in group]


def library(sources: list[Path], flags: list[str], folder: Path) -> Transform:
    """The C function transform_rows, compiled from these sources."""
    path = folder / f"transform{len(list(folder.glob('*.so')))}.so"
    subprocess.run(
        ["cc", "-std=gnu11", "-O3", "-fPIC", "-shared", "-w", *flags, *sources, "-o", path, "-lm"],
        check=True,
    )
    function = ctypes.CDLL(str(path)).transform_rows
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return lambda rows: function(rows.ctypes.data, rows.shape[1], rows.shape[0])


def ours(folder: Path) -> dict[str, Transform]:
    """Our transform, for the instruction sets that this processor has."""
    supports = ctypes.CDLL(str(cpu.library_path())).rhtcomm_supports
    source = ROOT / "benchmarks/lib/transform.c"
    common = ["-ffp-contract=off", "-fno-math-errno", f"-I{ROOT / 'rhtcomm/kernels'}"]
    return {
        name: library([source], [*common, *flags_of(variant)], folder)
        for variant, name in VARIANTS.items()
        if supports(variant.encode())
    }


def fht_cpu(folder: Path) -> Transform:
    """The package fht-cpu, installed into the folder."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, PEER], check=True, capture_output=True)
    sys.path.append(str(folder))
    module = importlib.import_module("fht_cpu")
    return lambda rows: module.fht_2d_f32_rows(rows, 1)


def ffht(sources: Path, folder: Path) -> Transform:
    wrapper = ROOT / "benchmarks/lib/transform.c"
    return library(
        [wrapper, sources / "fht.c", sources / "fast_copy.c"], ["-DFFHT", "-march=native"], folder
    )


def check(name: str, transform: Transform, rows: Rows) -> None:
    """Raise unless the result is within the error of float32: 2^-24 of its norm for each stage."""
    expected = rows.astype(np.float64)
    stages = rows.shape[1].bit_length() - 1
    for stride in (1 << stage for stage in range(stages)):
        pairs = expected.reshape(len(rows), -1, 2, stride)
        a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
    found = rows.copy()
    transform(found)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if not error <= stages * 2.0**-24:
        raise AssertionError(f"{name} at {rows.shape[1]} is {error:.1e} off")


def medians(contestants: dict[str, Transform], size: int, rounds: int) -> dict[str, float]:
    """Microseconds for a row of `size`, each in turn."""
    rows = np.random.default_rng(0).standard_normal((FLOATS // size, size), np.float32)
    for name, transform in contestants.items():
        check(name, transform, rows)
    work = rows.copy()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, transform in contestants.items():
            np.copyto(work, rows)  # which brings it into the cache, for all alike
            start = time.perf_counter()
            transform(work)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(s) / len(rows) for name, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ffht", type=Path, help="folder with the sources of FFHT")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mine = ours(folder)
        others = {"fht-cpu": fht_cpu(folder)}
        if arguments.ffht:
            others["FFHT"] = ffht(arguments.ffht, folder)
        lines = []
        for size in (1 << stage for stage in range(8, 15)):
            times = medians(mine | others, size, arguments.rounds)
            best = min(times[name] for name in others)
            ratios = [f"{best / times[name]:.2f}" for name in mine]
            lines.append([str(size), *(f"{t:.2f}" for t in times.values()), *ratios])
    header = ["d", *(mine | others), *(f"best other / {name}" for name in mine)]
    text = f"""{heading()}
Microseconds for one transform of d float32, medians of {arguments.rounds}, one thread. A call
transforms {FLOATS} float32, which stay in the second-level cache. {PEER} is from PyPI. FFHT is
compiled with -O3 -march=native.

{table(header, lines)}"""
    (arguments.out / "transform.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
