"""How the benchmarks write their results: Markdown that says what made it, and CSV."""

import csv
import platform
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from lib.machine import machine

RESULTS = Path(__file__).resolve().parents[1] / "results"


def heading() -> str:
    """The command, the machine and the versions of a run."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    arguments = f"Arguments: `{shlex.join(sys.argv[1:])}`. " if sys.argv[1:] else ""
    versions = f"NumPy {version('numpy')}, Matplotlib {version('matplotlib')}"
    return f"# {script}\n\n{arguments}{machine()}; {versions}, {platform.system()}\n"


def table_lines(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)
) -> Iterator[str]:
    """Lines of a Markdown table, each as its row comes; columns `left` go to the left."""
    rules = ["---" if column in left else "---:" for column in range(len(header))]
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join(rules)}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)
) -> str:
    """The same as one text."""
    return "\n".join(table_lines(header, rows, left)) + "\n"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of the same columns, at least one."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
