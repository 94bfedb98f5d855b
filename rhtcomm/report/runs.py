"""What a CSV file of `rhtcomm.hooks.telemetry` says, by step and by bucket."""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rhtcomm.hooks.telemetry import COLUMNS

__all__ = ["Bucket", "Run", "read_runs"]

Array = npt.NDArray[np.float64]

_MOST_LETTERS = 40  # of a name, whose end tells more


class Bucket(NamedTuple):
    """Means over the steps that had a bucket of this number and length."""

    bucket: int
    numel: int
    steps: int
    bits: float
    bytes_sent: float
    encode: float
    exchange: float
    decode: float
    exposed: float
    """nan: not measured."""

    @property
    def seconds(self) -> float:
        return self.encode + self.exchange + self.decode


@dataclass(frozen=True)
class Run:
    """One file. Arrays of rows have an entry for each bucket and step, nan where it is empty."""

    name: str
    rows: dict[str, Array]
    steps: Array
    """(n,) their numbers, ascending."""
    _of_row: npt.NDArray[np.intp]
    """(rows,) indices into `steps`."""

    @classmethod
    def of(cls, name: str, rows: dict[str, Array]) -> "Run":
        steps, of_row = np.unique(rows["step"], return_inverse=True)
        return cls(name, rows, steps, of_row)

    def by_step(self, values: Array) -> Array:
        """(n,) sums over the buckets of each step."""
        sums = np.bincount(self._of_row, weights=values, minlength=len(self.steps))
        return sums.astype(np.float64)  # which NumPy does not say of weighted sums

    def per_step(self, column: str) -> Array:
        """The same of a column; nan in steps of which no bucket has it."""
        values = self.rows[column]
        sums = self.by_step(np.nan_to_num(values))
        sums[self.by_step((~np.isnan(values)).astype(float)) == 0] = math.nan
        return sums

    @property
    def seconds(self) -> Array:
        """(n,) to encode, exchange and decode."""
        parts = [self.per_step(f"{part}_seconds") for part in ("encode", "exchange", "decode")]
        return parts[0] + parts[1] + parts[2]

    @property
    def ratio(self) -> Array:
        """(n,) compression ratio."""
        sent, uncompressed = self.per_step("bytes_sent"), self.per_step("bytes_uncompressed")
        ratio: Array = np.divide(uncompressed, sent, out=np.ones_like(sent), where=sent > 0)
        return ratio

    @property
    def nmse(self) -> Array:
        """(n,) of a step's buckets together, nan where it was not measured."""
        error = self.by_step(np.nan_to_num(self.rows["nmse"] * self.rows["squared_norm"]))
        norm = self.by_step(np.nan_to_num(self.rows["squared_norm"]))
        return np.divide(error, norm, out=np.full_like(norm, math.nan), where=norm > 0)

    @property
    def rotations(self) -> Array:
        """(n,) mean over the compressed buckets of a step, nan where there is none."""
        rotations = self.rows["rotations"]
        count = self.by_step((~np.isnan(rotations)).astype(float))
        total = self.by_step(np.nan_to_num(rotations))
        return np.divide(total, count, out=np.full_like(count, math.nan), where=count > 0)

    def waits(self) -> dict[int, int]:
        """Buckets by the power of two of microseconds that training waited less than; 0: not."""
        seconds = self.rows["exposed_seconds"]
        limits = (0 if x == 0 else 1 << int(x * 1e6).bit_length() for x in seconds if x == x)
        values, counts = np.unique(np.fromiter(limits, dtype=np.int64), return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def slowest_buckets(self, most: int) -> list[Bucket]:
        """By encode, exchange and decode together."""
        names = ("bits", "bytes_sent", "encode_seconds", "exchange_seconds", "decode_seconds")
        kinds, of_row, counts = np.unique(
            np.stack([self.rows["bucket"], self.rows["numel"]]),
            axis=1,
            return_inverse=True,
            return_counts=True,
        )
        of_row = of_row.reshape(-1)
        means = [np.bincount(of_row, weights=self.rows[name]) / counts for name in names]
        exposed = self.rows["exposed_seconds"]
        known = np.bincount(of_row, weights=~np.isnan(exposed))
        waited = np.bincount(of_row, weights=np.nan_to_num(exposed))
        mean = np.divide(waited, known, out=np.full_like(waited, math.nan), where=known > 0)
        columns = [*kinds.tolist(), counts.tolist(), *(m.tolist() for m in means), mean.tolist()]
        buckets = [
            Bucket(int(bucket), int(numel), steps, *rest)
            for bucket, numel, steps, *rest in zip(*columns, strict=True)
        ]
        return sorted(buckets, key=lambda bucket: -bucket.seconds)[:most]

    def figures(self) -> dict[str, str]:
        """Of the whole run, for the top of the page."""
        sent = self.rows["bytes_sent"].sum()
        saved = self.rows["bytes_uncompressed"].sum() - sent
        exposed = self.per_step("exposed_seconds")
        figures = {
            "steps": f"{len(self.steps):,}",
            "sent": _octets(sent),
            "saved": _octets(saved),
            "compression": f"{(sent + saved) / sent:.1f} times" if sent else "nothing sent",
            "encode, exchange, decode (median step)": f"{1e3 * np.median(self.seconds):.2f} ms",
        }
        if not np.isnan(exposed).all():
            figures["training waited (median step)"] = f"{1e3 * np.nanmedian(exposed):.2f} ms"
        return figures

    def summary(self) -> str:
        figures = self.figures()
        return f"{self.name} ({figures['steps']} steps, compression {figures['compression']})"


def _octets(count: float) -> str:
    unit, name = next((u for u in _UNITS if count >= u[0]), (1, "bytes"))
    return f"{count:.0f} {name}" if unit == 1 else f"{count / unit:.2f} {name}"


_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Those of some files, under names that tell them apart.

    Raises:
        ValueError: a file is missing, empty, or none that the observer wrote.
    """
    rows = [_read(path) for path in paths]
    for depth in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len({*names}) == len(names):
            break
    short = [name if len(name) <= _MOST_LETTERS else f"…{name[-_MOST_LETTERS:]}" for name in names]
    return [Run.of(name, one) for name, one in zip(short, rows, strict=True)]


def _read(path: Path) -> dict[str, Array]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"rhtcomm report: {path} cannot be read: {error}") from error
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        lines.pop()  # what a killed run was writing
    reader = csv.reader(lines)
    header = next(reader, [])
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ValueError(
            f"rhtcomm report: {path} has no column {missing[0]}; give a file that "
            'register(..., observer=rhtcomm.hooks.telemetry.csv("run.csv")) wrote'
        )
    rows = [*reader]
    if not rows:
        raise ValueError(f"rhtcomm report: {path} has no rows; the run finished no step")
    short = next((row for row in rows if len(row) != len(header)), None)
    if short is not None:
        raise ValueError(
            f"rhtcomm report: {path} is damaged: a row has {len(short)} of {len(header)} columns"
        )
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    numbers = {name: _numbers(columns[name], path) for name in COLUMNS}
    valid = _not_done_again(numbers["step"])
    return {name: column[valid] for name, column in numbers.items()}


def _not_done_again(steps: Array) -> npt.NDArray[np.bool_]:
    """Which rows count, where a running program loaded a checkpoint and went back some steps."""
    back = np.full(len(steps) + 1, math.inf)
    back[1:-1] = np.where(steps[1:] < steps[:-1], steps[1:], math.inf)
    earliest = np.minimum.accumulate(back[::-1])[::-1]  # that is gone back to behind a row
    return ~(steps >= earliest[1:])


def _numbers(texts: Iterable[str], path: Path) -> Array:
    number: Callable[[str], float] = lambda text: float(text) if text else math.nan  # noqa: E731
    try:
        numbers = np.array([number(text) for text in texts])
    except ValueError as error:
        raise ValueError(f"rhtcomm report: {path} is damaged: {error}") from error
    if np.isinf(numbers).any():
        raise ValueError(f"rhtcomm report: {path} is damaged: a number is infinite")
    return numbers
