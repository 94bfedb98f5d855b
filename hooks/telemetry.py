"""Observers that write down what the hook does, one line each:

    from rhtcomm.hooks import register, telemetry

    handle = register(model, bits=4, observer=telemetry.csv("run.csv"))

or several of them: ``observer=[telemetry.csv("run.csv"), telemetry.tensorboard("runs/one")]``.
``python -m rhtcomm report run.csv`` draws the plots of a CSV file.

Rank 0 of the world writes. An observer of your own is any function of a `BucketReport`; where it
has a method `close`, the handle's `close` calls it.
"""

import importlib.util
import itertools
import logging
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

import torch.distributed as dist

from ..arguments import natural
from .reports import Observer
from .stats import BucketReport, Totals, figures

__all__ = ["COLUMNS", "csv", "log", "tensorboard", "wandb"]

_CALL = "rhtcomm.hooks.telemetry"
_FLUSH_SECONDS = 0.1  # of steps that are shorter, a run that is killed may miss the last rows

COLUMNS = (
    "step",
    "bucket",
    "numel",
    "bits",
    "bytes_sent",
    "bytes_uncompressed",
    "encode_seconds",
    "exchange_seconds",
    "decode_seconds",
    "exposed_seconds",
    "rotations",
    "nmse",
    "squared_norm",
)
"""Columns of the CSV file, see `BucketReport`; empty cells were not measured."""


def csv(path: str | os.PathLike[str], *, all_ranks: bool = False) -> Observer:
    """Append a row for each bucket and step to a CSV file.

    Rows are written after each step, but at most every 0.1 s. So a run that is killed loses at most
    the last 0.1 s.

    A run that resumes from a checkpoint continues its file, and first drops the rows of steps that
    it repeats. A run that starts at step 0 starts a new file, and renames the old one to
    ``run.csv.previous``, or ``run.csv.previous.2`` and so on if that exists.

    Args:
        path: of the file; its folder is created if necessary.
        all_ranks: each rank writes its own file, ``run_rank0.csv`` and so on.
    """
    return _Csv(Path(path), all_ranks)


def tensorboard(to: Any, *, every: int = 100) -> Observer:
    """Add scalars to TensorBoard: means over every so many steps, named ``rhtcomm/...``.

    Args:
        to: the folder of the event files, or a `SummaryWriter`, which stays open.
        every: steps in one mean.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
        ValueError: every is less than 1.
    """
    _need("tensorboard")
    return _TensorBoard(to, every)


def wandb(run: Any = None, *, every: int = 100, commit: bool = False) -> Observer:
    """Log means over every so many steps to Weights & Biases, named ``rhtcomm/...``.

    Args:
        run: by default the one that `wandb.init` started last.
        every: steps in one mean.
        commit: False: they go into the row of your next `wandb.log`. True: into a row of their own,
            for programs that log nothing else.

    Raises:
        ModuleNotFoundError: wandb is not installed.
        ValueError: every is less than 1.
    """
    _need("wandb")
    return _Wandb(run, every, commit)


def log(*, every: int = 1000, level: int = logging.INFO) -> Observer:
    """Log one line for every so many steps, by the logger "rhtcomm".

    ``logging.basicConfig(level=logging.INFO)`` shows it.

    Args:
        every: steps in one line.
        level: of the line.

    Raises:
        ValueError: every is less than 1.
    """
    return _Log(every, level)


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{_CALL}.{package}: {package} is not installed; pip install {package}"
        )


def _rank(report: BucketReport) -> int:
    """The rank in the world; without torch.distributed, among the ranks that average."""
    return dist.get_rank() if dist.is_initialized() else report.rank


class _Csv:
    """See `csv`. The first report opens the file, since it has the first step of the run."""

    def __init__(self, path: Path, all_ranks: bool) -> None:
        self._path, self._all_ranks = path, all_ranks
        self._begun = False
        self._flush_at = 0.0
        self._file: TextIO | None = None
        self._finalizer: Any = None

    def __call__(self, report: BucketReport) -> None:
        if self._file is None:
            rank = _rank(report)
            if rank and not self._all_ranks:
                return
            self._file = self._open(report.step, rank)
        exposed = report.exposed_seconds
        error = f"{report.nmse:.6g},{report.squared_norm:.6g}" if report.squared_norm else ","
        self._file.write(
            f"{report.step},{report.bucket},{report.numel},{report.bits:g},"
            f"{report.bytes_sent},{report.bytes_uncompressed},{report.encode_seconds:.7f},"
            f"{report.exchange_seconds:.7f},{report.decode_seconds:.7f},"
            f"{'' if exposed is None else f'{exposed:.7f}'},{report.rotations or ''},{error}\n"
        )
        if report.last and (now := monotonic()) >= self._flush_at:
            self._file.flush()  # a run that is killed has its rows
            self._flush_at = now + _FLUSH_SECONDS

    def _open(self, step: int, rank: int) -> TextIO:
        path = self._path
        if self._all_ranks:
            path = path.with_name(f"{path.stem}_rank{rank}{path.suffix}")
        if not self._begun:
            path.parent.mkdir(parents=True, exist_ok=True)
            _begin_at(path, step)
            self._begun = True
        file = path.open("a", buffering=1 << 20)  # it is flushed in time
        self._finalizer = weakref.finalize(self, file.close)
        return file

    def close(self) -> None:
        if self._file is not None:
            self._finalizer()
            self._file = None


def _begin_at(path: Path, step: int) -> None:
    """Leave what a CSV file has of the steps before this one.

    Raises:
        ValueError: it is a file of something else, or no file, such as /dev/null.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{_CALL}.csv: {path} is no regular file; name another one")
    header = ",".join(COLUMNS)
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    if lines and lines[0].strip() != header:
        raise ValueError(
            f"{_CALL}.csv: {path} has other columns, {lines[0].strip()[:80]!r}; move it away, or "
            "name another file"
        )
    if step == 0 and lines:
        path.replace(_unused(path))
        lines = []
    # Of a line that a killed run was writing nothing is left either.
    kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) < step]
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join([f"{header}\n", *kept]))
    new.replace(path)


def _unused(path: Path) -> Path:
    """A name for an earlier run, of no file yet: ``run.csv.previous``, ``run.csv.previous.2``."""
    names = (f"{path.name}.previous{'' if n == 1 else f'.{n}'}" for n in itertools.count(1))
    return next(one for one in map(path.with_name, names) if not one.exists())


class _Means:
    """An observer that writes figures of every so many steps, as means."""

    def __init__(self, every: int) -> None:
        self._every = natural(every, _CALL, "every")
        if self._every < 1:
            raise ValueError(f"{_CALL}: every={every} must be at least 1, in steps")
        self._totals, self._steps = Totals(), 0
        self._none = self._totals.stats(0)
        self._first = self._last = -1  # of the steps in the totals

    def __call__(self, report: BucketReport) -> None:
        if self._steps == 0:
            if _rank(report):
                return
            self._first = report.step
        self._totals.add(report)
        self._totals.add_error(report.squared_error, report.squared_norm)
        if report.exposed_seconds is not None:
            self._totals.add_wait(report.exposed_seconds)
        if report.last:
            self._steps, self._last = self._steps + 1, report.step
            if self._steps == self._every:
                self._show()

    def _show(self) -> None:
        totals, steps = self._totals, self._steps
        self._totals, self._steps = Totals(), 0
        self.write(self._first, self._last, figures(self._none, totals.stats(steps)))

    def write(self, first: int, last: int, means: Mapping[str, float]) -> None:
        """Of the steps from the first to the last."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left."""
        if self._steps:
            self._show()


class _TensorBoard(_Means):
    def __init__(self, to: Any, every: int) -> None:
        super().__init__(every)
        self._flush_at = 0.0
        self._folder = to if isinstance(to, (str, os.PathLike)) else None
        self._writer = to if self._folder is None else None

    def write(self, first: int, last: int, means: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Of a resumed run, TensorBoard hides what it had of the steps that are done again.
            self._writer = SummaryWriter(self._folder, purge_step=first or None)
        for name, value in means.items():
            self._writer.add_scalar(name, value, last)
        if (now := monotonic()) >= self._flush_at:
            self._writer.flush()
            self._flush_at = now + 10 * _FLUSH_SECONDS

    def close(self) -> None:
        super().close()
        if self._folder is not None and self._writer is not None:
            self._writer.close()
            self._writer = None


class _Wandb(_Means):
    def __init__(self, run: Any, every: int, commit: bool) -> None:
        super().__init__(every)
        self._run, self._commit = run, commit

    def write(self, first: int, last: int, means: Mapping[str, float]) -> None:
        if self._run is None:
            import wandb as package

            self._run = package.run
        if self._run is None:
            raise RuntimeError(
                f"{_CALL}.wandb: there is no run; call wandb.init() before the first step, or give "
                "wandb(run)"
            )
        self._run.log({**means, "rhtcomm/step": last}, commit=self._commit)


class _Log(_Means):
    def __init__(self, every: int, level: int) -> None:
        super().__init__(every)
        self._level = level

    def write(self, first: int, last: int, means: Mapping[str, float]) -> None:
        figure = {name.partition("/")[2]: value for name, value in means.items()}
        parts = ["encode", "exchange", "decode"]
        seconds = [f"{part} {1e3 * figure[f'{part}_seconds']:.2f} ms" for part in parts]
        if "exposed_seconds" in figure:
            seconds.append(f"training waited {1e3 * figure['exposed_seconds']:.2f} ms")
        if "nmse" in figure:
            seconds.append(f"nmse {figure['nmse']:.3g}")
        logging.getLogger("rhtcomm").log(
            self._level,
            "rhtcomm: steps %d to %d, per step: %.3f MB sent (%.1f times fewer), %s",
            first,
            last,
            figure["bytes_sent"] / 1e6,
            figure["compression_ratio"],
            ", ".join(seconds),
        )
