"""What a benchmark found, as rows, JSON, CSV and a table."""

import csv
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["Result", "Row", "Step", "in_words", "mebibytes", "write_csv", "write_json"]


@dataclass(frozen=True)
class Row:
    """Exchanges of one bucket; times in seconds, each that of the slowest rank."""

    contestant: str
    carrier: str
    quantizer: str | None
    algorithm: str | None
    bits: float
    numel: int
    rounds: int
    median: float
    low: float  # 10% of the times are below
    high: float  # 10% are above
    encode: float | None  # rank 0, medians; None: the hook does not tell
    exchange: float | None  # what it waited for
    decode: float | None
    bytes_sent: float | None  # by rank 0
    nmse: float  # |mean' - mean|^2 / |mean|^2


@dataclass(frozen=True)
class Step:
    """Training steps; seconds of the slowest rank. `exposed` is what communication adds."""

    contestant: str
    quantizer: str | None
    algorithm: str | None
    bits: float
    rounds: int
    median: float
    low: float
    high: float
    exposed: float


@dataclass
class Result:
    """All of it. `facts` are those of the machine and the run, `parts` the seconds of each part."""

    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    advice: str = ""


def write_json(result: Result, path: Path) -> None:
    """Format 1: what `plan --from` reads. What is unknown or infinite is null."""
    content = {"format": 1, **result.facts}
    for name in ("rows", "steps"):
        content[name] = [_plain(asdict(row)) for row in getattr(result, name)]
    for name in ("failed", "dropped", "parts", "advice"):
        content[name] = getattr(result, name)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def write_csv(result: Result, path: Path) -> None:
    """The rows, one line each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in result.rows)


def mebibytes(numel: float) -> str:
    """Of float32, to three digits."""
    return f"{numel / 2**18:.3g} MiB"


def in_words(row: Row | Step) -> str:
    """As a sentence names it: "4 bits, two_shot"."""
    if row.quantizer is None:
        return row.contestant
    words = [f"{row.bits:g} bit{'s' if row.bits != 1 else ''}"]
    words += [row.quantizer] if row.quantizer != "quic_fl" else []
    words += [row.algorithm] if row.algorithm not in (None, "auto", "lattice") else []
    words += getattr(row, "carrier", "").split(", ")[1:]  # such as "two levels"
    return ", ".join(words)
