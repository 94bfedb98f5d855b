"""The plots of a page: what each says, and how it is drawn on matplotlib's axes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rhtcomm.report.runs import Array, Run

__all__ = ["COLORS", "Plot", "plots_of"]

COLORS = ("#3366aa", "#dd6633", "#228855", "#aa3377", "#999922", "#33aacc")  # of runs
_PARTS = {"encode": "#88bbee", "exchange": "#ffbb66", "decode": "#88cc99"}
_EXPOSED = "#222222"
_MOST_POINTS = 400  # of a line; of more steps it shows means


class Plot(NamedTuple):
    title: str
    caption: str
    draw: Callable[[Any], None]
    """On axes."""


def plots_of(runs: Sequence[Run]) -> list[Plot]:
    """Of a page that compares these runs, or shows the only one."""
    plots = [
        Plot(
            "Bytes sent per step",
            "By this rank. Dashed: what a ring all-reduce of the gradients would have sent.",
            lambda axes: _bytes(axes, runs),
        ),
        Plot(
            "Compression ratio",
            "Bytes uncompressed / bytes sent. The first 64 steps travel with 8 bits by default.",
            lambda axes: _lines(axes, runs, lambda run: run.ratio, "times fewer bytes"),
        ),
        *(_times(run, runs) for run in runs),
        Plot(
            "Exposed waits",
            "How often training waited so long for the mean of a bucket. 0: it was there before.",
            lambda axes: _waits(axes, runs),
        ),
    ]
    if any(not np.isnan(run.nmse).all() for run in runs):
        plots.append(
            Plot(
                "NMSE of the mean",
                "|mean - exact|² / |exact|², in the steps that nmse_every samples.",
                lambda axes: _nmse(axes, runs),
            )
        )
    plots.append(
        Plot(
            "Rotations",
            "Randomized Hadamard transforms per block, mean over the compressed buckets.",
            lambda axes: _rotations(axes, runs),
        )
    )
    return plots


def _times(run: Run, runs: Sequence[Run]) -> Plot:
    """Of one of the runs, on the scale of all."""
    exposed = [run.per_step("exposed_seconds") for run in runs]
    top = 1e3 * _top([run.seconds for run in runs] + exposed)
    return Plot(
        f"Time per step: {run.name}" if len(runs) > 1 else "Time per step",
        "Encode, exchange and decode add up on the thread that exchanges. Exposed: the part of a "
        "step in which training waited for it.",
        lambda axes: _areas(axes, run, top),
    )


def _thin(steps: Array, values: Array) -> tuple[Array, Array]:
    """At most some hundred points: of longer runs, means over steps that follow each other."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    width = math.ceil(len(steps) / _MOST_POINTS)
    starts = np.arange(0, len(steps), width)
    known = np.add.reduceat((~np.isnan(values)).astype(float), starts)
    sums = np.add.reduceat(np.nan_to_num(values), starts)
    means = np.divide(sums, known, out=np.full_like(sums, math.nan), where=known > 0)
    return steps[starts], means


def _lines(axes: Any, runs: Sequence[Run], values: Callable[[Run], Array], label: str) -> None:
    for run, style in zip(runs, _styles(runs), strict=True):
        axes.plot(*_thin(run.steps, values(run)), **style)
    axes.set_ylim(0, _top([values(run) for run in runs]))
    _finish(axes, label, legend=len(runs) > 1)


def _bytes(axes: Any, runs: Sequence[Run]) -> None:
    for run, style in zip(runs, _styles(runs), strict=True):
        sent, uncompressed = run.per_step("bytes_sent"), run.per_step("bytes_uncompressed")
        axes.plot(*_thin(run.steps, sent / 1e6), **style)
        axes.plot(*_thin(run.steps, uncompressed / 1e6), **style | {"ls": "--", "label": None})
    axes.set_ylim(bottom=0)
    _finish(axes, "MB", legend=len(runs) > 1)


def _areas(axes: Any, run: Run, top: float) -> None:
    thinned = [_thin(run.steps, 1e3 * run.per_step(f"{part}_seconds")) for part in _PARTS]
    steps, parts = thinned[0][0], [values for _, values in thinned]
    exposed = 1e3 * run.per_step("exposed_seconds")
    axes.stackplot(steps, *parts, labels=[*_PARTS], colors=[*_PARTS.values()], lw=0)
    if not np.isnan(exposed).all():
        axes.plot(*_thin(run.steps, exposed), color=_EXPOSED, lw=1.2, label="exposed")
    axes.set_ylim(0, top)
    _finish(axes, "ms", legend=True)


def _waits(axes: Any, runs: Sequence[Run]) -> None:
    waits = [run.waits() for run in runs]
    limits = sorted({limit for one in waits for limit in one})
    width = 0.8 / len(runs)
    for i, (run, one) in enumerate(zip(runs, waits, strict=True)):
        places = np.arange(len(limits)) + (i - (len(runs) - 1) / 2) * width
        counts = [one.get(x, 0) for x in limits]
        axes.bar(places, counts, width, color=_color(i), label=run.name)
    axes.set_xticks(range(len(limits)), [_limit(limit) for limit in limits], rotation=45)
    if not limits:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    _finish(axes, "buckets", legend=len(runs) > 1, x="waited less than")


def _limit(microseconds: int) -> str:
    if microseconds == 0:
        return "0"
    for unit, name in ((1 << 20, "s"), (1 << 10, "ms")):
        if microseconds >= unit:
            return f"{microseconds // unit} {name}"
    return f"{microseconds} µs"


def _nmse(axes: Any, runs: Sequence[Run]) -> None:
    for run, style in zip(runs, _styles(runs), strict=True):
        sampled = ~np.isnan(run.nmse)
        if sampled.any():
            points = _thin(run.steps[sampled], run.nmse[sampled])
            axes.plot(*points, **style | {"marker": "o", "ms": 3, "lw": 1})
    axes.set_yscale("log")
    _finish(axes, "NMSE", legend=len(runs) > 1)


def _rotations(axes: Any, runs: Sequence[Run]) -> None:
    for run, style in zip(runs, _styles(runs), strict=True):
        axes.plot(*_thin(run.steps, run.rotations), **style)
    axes.set_ylim(0.5, 3.5)
    axes.set_yticks([1, 2, 3])
    _finish(axes, "transforms", legend=len(runs) > 1)


def _finish(axes: Any, y: str, legend: bool, x: str = "step") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        names = axes.get_legend_handles_labels()[1]
        columns = max(1, min(4, 60 // (6 + max(map(len, names)))))
        axes.legend(loc="lower center", ncols=columns, frameon=False, bbox_to_anchor=(0.5, 1.0))


def _top(lines: Sequence[Array]) -> float:
    """Where an axis from 0 ends: a few steps that took much longer do not make all others flat."""
    found = [np.nanquantile(line, 0.98) for line in lines if not np.isnan(line).all()]
    return 1.25 * max(found, default=0.0) or 1.0


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _styles(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of lines; where two runs have the same one, the wider one below shows at its sides."""
    widths = np.linspace(3.6, 1.2, len(runs)) if len(runs) > 1 else [1.6]
    return [
        {"color": _color(i), "label": run.name, "lw": width}
        for i, (run, width) in enumerate(zip(runs, widths, strict=True))
    ]
