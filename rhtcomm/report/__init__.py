"""One page of plots of a run, from the CSV file that `rhtcomm.hooks.telemetry.csv` wrote."""

import argparse
import importlib.util
from pathlib import Path

from rhtcomm.report.runs import read_runs

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="run.csv",
        help="of one run, or of several runs or ranks to compare",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        help="page.html, which needs no other file, or page.png (default: the first file's name, "
        "ending in .html)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page; the exit status.

    Raises:
        ValueError: a file is missing or has other columns, --out ends in something else or is in
            no folder, or matplotlib is not installed.
    """
    first: Path = args.files[0]
    out: Path = getattr(args, "out", None) or first.parent / f"{first.stem or 'run'}.html"
    if out.suffix not in (".html", ".png"):
        raise ValueError(f"rhtcomm report: --out {out} must end in .html or .png")
    if not out.parent.is_dir():
        raise ValueError(f"rhtcomm report: --out {out}: there is no folder {out.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "rhtcomm report: matplotlib, which draws the plots, is not installed; "
            "pip install 'rhtcomm[plot]'"
        )
    from rhtcomm.report import page

    runs = read_runs(args.files)
    if out.suffix == ".png":
        page.write_png(runs, out)
    else:
        out.write_text(page.html(runs), encoding="utf-8")
    print(f"{out}: {', '.join(one.summary() for one in runs)}")
    return 0
