"""The Triton kernels on paper: what they do for each coordinate, and how fast a GPU could do it.

    python benchmarks/sass.py            for an H100, in some minutes; needs Triton and no GPU

Compiles the kernels for compute capability 9.0 and counts the instructions that run for a block of
4096. A multiprocessor has limits for each kind, from the CUDA programming guide, and the slowest
says how many clocks a coordinate takes at least. The share of the roofline is the time that the
bytes need at the rate of a device-to-device copy, over that time. It is a bound, not a measurement:
nothing waits for anything in it.
"""

import argparse
import itertools
from pathlib import Path

import torch
import triton

import rhtcomm
from lib.compiled import Counts, compiled, count
from lib.progress import progress
from lib.report import RESULTS, table

BLOCK = 4096
MULTIPROCESSORS, CLOCK, COPY = 132, 1.755e9, 3.0e12  # of an H100: Hz, and bytes per second
# Of a multiprocessor, for each clock: instructions of 32 threads that are issued and, of threads,
# results of float and of integer instructions, conversions to integers, words of shared memory
# and of the cache that is one with it.
ISSUED, FLOATS, INTEGERS, CONVERSIONS, WORDS = 4 * 32, 128, 64, 16, 32
CONFLICTS = 3.5  # most words that one of 32 banks has, of 32 at random: its mean
REGISTERS, SHARED, PROGRAMS = 65536, 227 << 10, 32


def clocks(counts: Counts) -> dict[str, float]:
    """Of a multiprocessor for a coordinate, by what would take them."""
    return {
        "instructions": counts.total / ISSUED,
        "floats": counts.kind("float") / FLOATS,
        "integers": (counts.kind("integer") - counts.names["F2I"]) / INTEGERS,
        "conversions": counts.names["F2I"] / CONVERSIONS,
        "shared memory": (counts.words + (CONFLICTS - 1) * counts.looked_up) / WORDS,
    }


def resident(counts: Counts) -> int:
    """Programs that a multiprocessor holds at once."""
    registers = -(-counts.registers // 8) * 8 * counts.threads
    shared = counts.shared + 1024
    return min(PROGRAMS, REGISTERS // registers, SHARED // shared)


def rows_of(case: tuple[torch.dtype, int, int, bool]) -> tuple[list[str], list[str]]:
    dtype, rotations, bits, encode = case
    codec = rhtcomm.Codec(rhtcomm.QuicFL(bits), rotations, BLOCK)
    counts = count(compiled(codec, dtype, encode), BLOCK)
    nbytes = dtype.itemsize + (codec.nbytes(BLOCK << 10) / (BLOCK << 10))
    floor = nbytes / COPY * MULTIPROCESSORS * CLOCK
    limits = clocks(counts)
    slowest = max(limits, key=limits.__getitem__)
    name = ["encode" if encode else "decode, K = 1", str(dtype).removeprefix("torch.")]
    name += [str(rotations), str(bits)]
    kinds = [counts.kind(kind) for kind in ("float", "integer", "memory", "shared", "control")]
    first = [*name, f"{counts.total:.1f}", *(f"{n:.1f}" for n in kinds), str(counts.registers)]
    first += [str(counts.spilled), f"{counts.shared >> 10}", str(resident(counts))]
    second = [*name, f"{nbytes:.2f}", f"{floor:.3f}", *(f"{n:.3f}" for n in limits.values())]
    second += [slowest, f"{min(1, floor / limits[slowest]):.0%}"]
    return first, second


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="b = 4 and k = 2 alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu-on-paper.md")
    given = parser.parse_args(arguments)
    cases = [
        (dtype, 2, 4, encode)
        for dtype in (torch.float32, torch.bfloat16)
        for encode in (True, False)
    ]
    if not given.quick:
        cases += [(dtype, 1, 4, encode) for dtype, _, _, encode in cases[:4]]
        cases += [
            (torch.float32, 2, bits, encode)
            for bits, encode in itertools.product((1, 2, 3, 8), (True, False))
        ]
        cases += [(torch.float32, 3, 4, encode) for encode in (True, False)]
    rows = [rows_of(case) for case in progress(cases, "kernels")]
    name = ["", "dtype", "k", "b"]
    text = "\n".join(
        [
            "# benchmarks/sass.py",
            "",
            f"QUIC-FL, blocks of {BLOCK}, compiled for compute capability 9.0 by Triton "
            f"{triton.__version__}. No GPU ran.",
            "",
            "Thread instructions per coordinate, by kind; registers and spilled bytes per thread; "
            "KiB of shared",
            "memory per program; programs that fit on a multiprocessor:",
            "",
            table(
                [
                    *name,
                    "all",
                    "float",
                    "integer",
                    "memory",
                    "shared",
                    "control",
                    "registers",
                    "spilled",
                    "shared, KiB",
                    "programs",
                ],
                [first for first, _ in rows],
                left=(0, 1),
            ),
            f"Multiprocessor clocks per coordinate on an H100 ({MULTIPROCESSORS} of them at "
            f"{CLOCK / 1e9} GHz, a copy",
            f"at {COPY / 1e12} TB/s): for the bytes alone, and the minimum set by each resource.",
            "",
            table(
                [
                    *name,
                    "bytes",
                    "bytes alone",
                    "instructions",
                    "floats",
                    "integers",
                    "conversions",
                    "shared memory",
                    "slowest",
                    "share of the roofline, at most",
                ],
                [second for _, second in rows],
                left=(0, 1, 11),
            ),
        ]
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu-on-paper.md").write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    main()
