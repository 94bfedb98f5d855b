"""A plot of a benchmark; needs matplotlib."""

import importlib.util
from pathlib import Path

from rhtcomm.bench.results import Result, mebibytes

__all__ = ["check_matplotlib", "plot"]


def check_matplotlib() -> None:
    """Raise ValueError where it is missing; called before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "rhtcomm bench: --plot needs matplotlib; pip install 'rhtcomm[plot]', or leave it out"
        )


def plot(result: Result, path: Path) -> None:
    """A panel for each size: medians as bars, the fastest first, with the range from 10% to 90%."""
    from matplotlib.figure import Figure

    sizes = sorted({row.numel for row in result.rows}, reverse=True)
    rows_by_time = sorted(result.rows, key=lambda row: row.median)
    panels = [[row for row in rows_by_time if row.numel == numel] for numel in sizes]
    heights = [len(rows) + 2 for rows in panels]
    figure = Figure(figsize=(8, 0.22 * sum(heights) + 1), layout="constrained")
    axes = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, numel, rows in zip(axes, sizes, panels, strict=True):
        names = [f"{row.contestant}, {row.carrier}" for row in rows]
        medians = [1e3 * row.median for row in rows]
        ranges = [
            [max(0.0, 1e3 * (row.median - row.low)) for row in rows],
            [max(0.0, 1e3 * (row.high - row.median)) for row in rows],
        ]
        colors = ["C0" if row.quantizer else "0.6" for row in rows]
        axis.barh(names, medians, xerr=ranges, color=colors, error_kw={"elinewidth": 0.8})
        axis.set(title=mebibytes(numel), xlabel="ms, median and 10% to 90%; blue: rhtcomm")
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(y=0.01)
        axis.invert_yaxis()
    figure.savefig(path, dpi=110)
