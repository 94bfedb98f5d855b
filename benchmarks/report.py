"""How the benchmarks write their results: Markdown that says what made it."""

import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from kernels import machine

RESULTS = Path(__file__).resolve().parent / "results"


def heading() -> str:
    """The command, the machine and the versions of a run."""
    command = shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return (
        f"# {command}\n\n{machine()}; NumPy {np.__version__}, Matplotlib {matplotlib.__version__}, "
        f"{platform.system()}\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)) + "\n"
