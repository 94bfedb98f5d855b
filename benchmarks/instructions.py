"""Count the instructions that the C kernels execute for each coordinate, with AVX2 and with NEON.

    python benchmarks/instructions.py > benchmarks/results/instructions.md

takes half a minute, and needs x86-64 Linux, gcc, and QEMU 7.2 to 8 with a compiler for aarch64
(Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user).

QEMU runs one step of a tensor once and twice, and a plugin counts: the difference is what the step
took. Before, the emulated program has checked that it gives the bits of the torch reference. These
are counts, not times: processors differ in how many instructions a clock begins, and how long each
takes.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lib.progress import progress
from lib.report import table
from rhtcomm import ECDQ, Codec, Eden, Key, Lattice, QuicFL, VectorQuantizer
from rhtcomm.kernels import reference, use
from rhtcomm.quantizers import Quantizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels" / "cross"))
import cases
import run

LIB = Path(__file__).parent / "lib"
NUMEL, BLOCK = 1 << 18, 4096  # four of ECDQ's units, which AVX2 codes side by side


class Target(NamedTuple):
    name: str
    compiler: tuple[str, ...]
    emulator: tuple[str, ...]


TARGETS = (
    Target(
        "AVX2",
        ("gcc", "-mavx2", "-mbmi", "-mbmi2", "-mfma", "-mpopcnt"),
        ("qemu-x86_64", "-cpu", "max"),
    ),
    Target("NEON", ("aarch64-linux-gnu-gcc",), ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")),
)


class Row(NamedTuple):
    name: str
    quantizer: Quantizer | Lattice
    rotations: int
    step: str
    ranks: int = 1
    dtype: torch.dtype = torch.float32

    def names(self) -> list[str]:
        dtype = str(self.dtype).removeprefix("torch.")
        step = f"{self.step}, {self.ranks} ranks" if self.ranks > 1 else self.step
        return [self.name, dtype, str(self.rotations), step]


def rows() -> Iterator[Row]:
    for name, quantizer in (("QUIC-FL, 4 bits", QuicFL(4)), ("ECDQ, 4 bits", ECDQ(4))):
        for rotations in (1, 2):
            yield Row(name, quantizer, rotations, "encode")
            yield Row(name, quantizer, rotations, "decode")
            yield Row(name, quantizer, rotations, "decode", 2)
    for step in ("rotate", "encode", "decode"):
        yield Row("lattice, 4 bits", Lattice(4, 1, BLOCK), 1, step, 2)
    others: dict[str, Quantizer] = {
        "QUIC-FL, 4 bits, 1/512 exactly": QuicFL(4, exact_fraction=1 / 512),
        "EDEN, 4 bits": Eden(4),
        "vectors, 2 bits": VectorQuantizer(2),
    }
    for name, quantizer in others.items():
        yield Row(name, quantizer, 1, "encode")
        yield Row(name, quantizer, 1, "decode")
    for dtype in (torch.bfloat16, torch.float16):
        yield Row("QUIC-FL, 4 bits", QuicFL(4), 1, "encode", 1, dtype)
        yield Row("QUIC-FL, 4 bits", QuicFL(4), 1, "decode", 1, dtype)


def write(path: Path, row: Row) -> None:
    """The case of a row."""
    generator, key, ranks = torch.Generator().manual_seed(1), Key(3), row.ranks
    xs = torch.randn(ranks, NUMEL, generator=generator).to(row.dtype)
    if isinstance(row.quantizer, Lattice):
        cases.write(path, cases.lattice_case(row.quantizer, key, 0, 0, xs))
        return
    codec = Codec(row.quantizer, row.rotations, BLOCK)
    with use(reference):
        payloads = torch.stack([codec.encode(x, key, rank, ranks) for rank, x in enumerate(xs)])
        mean = codec.decode_mean(payloads, key, NUMEL, out=torch.empty(NUMEL, dtype=row.dtype))
    facts = (codec.task(NUMEL), key, 0, 0, ranks, 0, xs[0], payloads)
    cases.write(path, cases.payload_case(*facts, cases.bytes_of(mean), row.dtype))


def executed(target: Target, folder: Path, row: Row) -> str:
    """Instructions for each coordinate."""
    counts = []
    for times in ("1", "2"):
        command = [*target.emulator, "-plugin", str(folder / "count.so")]
        command += [str(folder / target.name), str(folder / "case"), row.step, times]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{row.names()} by {target.name}: the bits are wrong. {done.stderr}")
        counts.append(int(done.stderr))
    return f"{(counts[1] - counts[0]) / NUMEL:.1f}"


def build(target: Target, folder: Path) -> None:
    source, program = str(LIB / "instructions.c"), str(folder / target.name)
    flags = [flag for flag in run.FLAGS if flag != "-fopenmp"]
    compiler = [*target.compiler, *flags, *run.DEFINITIONS, "-w"]
    subprocess.run([*compiler, source, "-o", program, "-lm"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    tools = {tool for target in TARGETS for tool in (target.compiler[0], target.emulator[0])}
    missing = sorted(tool for tool in tools if shutil.which(tool) is None)
    if missing:
        print(f"{' and '.join(missing)} cannot be found", file=sys.stderr)
        return 1
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugin = [str(LIB / "count.c"), "-o", str(folder / "count.so")]
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", *plugin], check=True)
        for target in TARGETS:
            build(target, folder)
        for row in progress(list(rows()), "steps"):
            write(folder / "case", row)
            found = [executed(target, folder, row) for target in TARGETS]
            ratio = float(found[1]) / float(found[0])
            lines.append([*row.names(), *found, f"{ratio:.2f}"])
    names = [target.name for target in TARGETS]
    print(f"# benchmarks/{Path(__file__).name}\n")
    print(f"Instructions per coordinate, of {NUMEL} in blocks of {BLOCK}, under QEMU. Built by:\n")
    for target in TARGETS:
        version = subprocess.run([target.compiler[0], "--version"], capture_output=True, text=True)
        print(f"* {target.name}: {version.stdout.splitlines()[0]}")
    print()
    print(table(["", "dtype", "k", "step", *names, "ratio"], lines, left=(0, 1, 3)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
