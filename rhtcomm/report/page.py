"""The page: a self-contained HTML file, or one PNG."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from rhtcomm.report.plots import Plot, plots_of
from rhtcomm.report.runs import Run

__all__ = ["html", "write_png"]

_MOST_BUCKETS = 8
_FONT: Any = {"font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9}
_HEADER = (
    "bucket",
    "coordinates",
    "steps",
    "bits",
    "kB sent",
    "encode",
    "exchange",
    "decode",
    "waited",
)


def html(runs: Sequence[Run]) -> str:
    """With all images in it."""
    title = escape(", ".join(run.name for run in runs))
    parts = [f"<h1>rhtcomm: {title}</h1>"]
    parts += [_figures(run, several=len(runs) > 1) for run in runs]
    parts += ['<div class="plots">', *map(_figure, plots_of(runs)), "</div>"]
    for run in runs:
        of_run = f": {escape(run.name)}" if len(runs) > 1 else ""
        parts.append(f"<h2>Slowest buckets{of_run}</h2>{_table(run)}")
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>rhtcomm: {title}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  max-width: 1180px; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: .6rem; margin: .8rem 0; }
dl div { background: #f3f5f8; border-radius: .4rem; padding: .5rem .8rem; }
dt { font-size: .8rem; color: #555; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr));
  gap: 1.2rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #ddd; }
"""


def _figures(run: Run, several: bool) -> str:
    items = [
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in run.figures().items()
    ]
    return f"{f'<h2>{escape(run.name)}</h2>' if several else ''}<dl>{''.join(items)}</dl>"


def _figure(plot: Plot) -> str:
    data = base64.b64encode(_image(plot)).decode()
    return (
        f"<figure><h2>{escape(plot.title)}</h2>"
        f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _image(plot: Plot) -> bytes:
    with rc_context(_FONT):
        figure = Figure(figsize=(5, 2.8), dpi=220, layout="constrained")
        plot.draw(figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _cells(run: Run) -> Iterator[list[str]]:
    """Of the slowest buckets; times in ms."""
    for bucket in run.slowest_buckets(_MOST_BUCKETS):
        times = (bucket.encode, bucket.exchange, bucket.decode, bucket.exposed)
        yield [
            str(bucket.bucket),
            f"{bucket.numel:,}",
            f"{bucket.steps:,}",
            f"{bucket.bits:.3g}",
            f"{bucket.bytes_sent / 1e3:,.1f}",
            *("" if x != x else f"{1e3 * x:.2f}" for x in times),
        ]


def _table(run: Run) -> str:
    head = "".join(f"<th>{name}</th>" for name in _HEADER)
    rows = ["<tr>" + "".join(f"<td>{x}</td>" for x in cells) + "</tr>" for cells in _cells(run)]
    note = "Means over steps; times in ms."
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div><p>{note}</p>'


def write_png(runs: Sequence[Run], path: Path) -> None:
    """The same in one image."""
    plots = plots_of(runs)
    rows = -(-len(plots) // 2)
    heights = [2.9] * rows + [0.5 + 0.22 * (_MOST_BUCKETS + 1)] * len(runs)
    with rc_context(_FONT):
        figure = Figure(figsize=(11, sum(heights) + 0.7 * len(runs)), dpi=120, layout="constrained")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        for i, plot in enumerate(plots):
            axes = figure.add_subplot(grid[i // 2, i % 2])
            plot.draw(axes)
            axes.set_title(plot.title, loc="left", pad=20, weight="bold")
        for i, run in enumerate(runs):
            _draw_table(figure.add_subplot(grid[rows + i, :]), run)
        figure.suptitle("\n".join(_lines(run) for run in runs), x=0.02, ha="left")
        figure.savefig(path, format="png")


def _lines(run: Run) -> str:
    figures = [f"{name}: {value}" for name, value in run.figures().items()]
    return f"{run.name}\n{'   '.join(figures[:4])}\n{'   '.join(figures[4:])}"


def _draw_table(axes: Any, run: Run) -> None:
    axes.axis("off")
    axes.set_title(f"Slowest buckets: {run.name} (means over steps, times in ms)", loc="left")
    axes.table([*_cells(run)], colLabels=_HEADER, loc="upper center", edges="horizontal")
