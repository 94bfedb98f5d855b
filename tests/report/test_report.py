"""`python -m rhtcomm report`: what the page has, from files that the observer wrote."""

import argparse
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rhtcomm import report
from rhtcomm.hooks import BucketReport, telemetry
from rhtcomm.report.plots import plots_of
from rhtcomm.report.runs import Run, read_runs

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

STEPS, BUCKETS = 1000, 2


def write(path: Path, *, slow: float = 1.0, nmse: bool = True, steps: int = STEPS) -> Path:
    """8 bits in the first half of the steps, 4 in the rest; of two buckets one is not waited for.

    Bucket 0 takes 1, 2 and 3 ms times `slow`; bucket 1, which is first in the file, half of that.
    """
    observer = telemetry.csv(path)
    for step in range(steps):
        bits = 8 if step < steps / 2 else 4
        sampled = nmse and step % 10 == 0
        for bucket in (1, 0):
            scale = slow * (1 if bucket == 0 else 0.5)
            observer(
                BucketReport(
                    rank=0,
                    step=step,
                    bucket=bucket,
                    numel=1 << 20,
                    bits=bits,
                    bytes_sent=bits << 17,
                    bytes_uncompressed=32 << 17,
                    encode_seconds=0.001 * scale,
                    exchange_seconds=0.002 * scale,
                    decode_seconds=0.003 * scale,
                    rotations=1 + bucket,
                    squared_error=(0.03 if bucket else 0.0) * sampled,
                    squared_norm=(1.0 + bucket) * sampled,
                    exposed_seconds=0.005 if bucket == 0 else 0.0,
                    last=bucket == 0,
                )
            )
    observer.close()  # type: ignore[attr-defined]
    return path


def run(*files: Path, out: Path | None = None) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    arguments = [*map(str, files), *(("--out", str(out)) if out else ())]
    return report.run(parser.parse_args(arguments))


def drawn(runs: list[Run]) -> dict[str, Any]:
    """The axes of each plot, by title."""
    from matplotlib.figure import Figure

    axes = {}
    for plot in plots_of(runs):
        axes[plot.title] = Figure().subplots()
        plot.draw(axes[plot.title])
    return axes


TITLES = (
    "Bytes sent per step",
    "Compression ratio",
    "Time per step",
    "Exposed waits",
    "NMSE of the mean",
    "Rotations",
)


def test_a_page_has_each_plot_and_the_figures_and_needs_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a<b.csv")
    assert run(path) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/a<b.html: a<b (1,000 steps, compression 5.3 times)\n"
    )
    page = (tmp_path / "a<b.html").read_text()
    assert re.findall('<img alt="([^"]*)" src="data:image/png;base64,', page) == [*TITLES]
    assert "<title>rhtcomm: a&lt;b</title>" in page
    figures = dict(re.findall("<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))
    assert figures == {
        "steps": "1,000",
        "sent": "1.57 GB",
        "saved": "6.82 GB",
        "compression": "5.3 times",
        "encode, exchange, decode (median step)": "9.00 ms",
        "training waited (median step)": "5.00 ms",
    }
    rows = [re.findall("<td>([^<]*)</td>", row) for row in re.findall("<tr>(<td.*?)</tr>", page)]
    kilobytes = f"{6 * 2**17 / 1e3:.1f}"
    assert rows == [  # the slowest first
        ["0", "1,048,576", "1,000", "6", kilobytes, "1.00", "2.00", "3.00", "5.00"],
        ["1", "1,048,576", "1,000", "6", kilobytes, "0.50", "1.00", "1.50", "0.00"],
    ]
    assert not re.search(r"https?://|<script|<link|url\(", page)


def test_plots_show_the_sums_of_each_step(tmp_path: Path) -> None:
    runs = read_runs([write(tmp_path / "run.csv")])
    axes = drawn(runs)
    assert tuple(axes) == TITLES
    halves = np.repeat([0.0, 1.0], [167, 167])  # 334 means of 3 steps; step 500 is the 3rd of one
    sent, uncompressed = (line.get_ydata() for line in axes["Bytes sent per step"].lines)
    np.testing.assert_allclose(uncompressed, 2 * 32 * 2**17 / 1e6)
    expected = np.where(halves == 0, 16.0, 8.0) * 2**17 / 1e6
    expected[166] = (16 + 16 + 8) / 3 * 2**17 / 1e6
    np.testing.assert_allclose(sent, expected)
    (ratio,) = (line.get_ydata() for line in axes["Compression ratio"].lines)
    assert (ratio[0], ratio[-1]) == (4, 8)
    times = axes["Time per step"]
    tops = [area.get_paths()[0].get_extents().ymax for area in times.collections]
    assert tops == pytest.approx([1.5, 4.5, 9.0])  # stacked, in ms
    (exposed,) = (line.get_ydata() for line in times.lines)
    np.testing.assert_allclose(exposed, 5)
    names = [text.get_text() for text in times.get_legend().get_texts()]
    assert names == ["encode", "exchange", "decode", "exposed"]
    waits = axes["Exposed waits"]
    assert [bar.get_height() for bar in waits.patches] == [1000, 1000]
    assert [label.get_text() for label in waits.get_xticklabels()] == ["0", "8 ms"]
    (nmse,) = axes["NMSE of the mean"].lines
    np.testing.assert_allclose(nmse.get_ydata(), 0.01)
    assert [*nmse.get_xdata()] == [*range(0, STEPS, 10)]
    (rotations,) = (line.get_ydata() for line in axes["Rotations"].lines)
    np.testing.assert_allclose(rotations, 1.5)


def test_runs_are_compared_on_one_scale_and_a_png_has_the_same(tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    files = [
        write(folder / "run.csv", slow=slow, nmse=slow > 1, steps=40)
        for folder, slow in zip(folders, (1, 3), strict=True)
    ]
    runs = read_runs(files)
    assert [one.name for one in runs] == ["one/run", "two/run"]
    axes = drawn(runs)
    assert len(axes) == len(TITLES) + 1
    slow, fast = (
        axes.pop(f"Time per step: {runs[1].name}"),
        axes.pop(f"Time per step: {runs[0].name}"),
    )
    assert slow.get_ylim() == fast.get_ylim()
    assert len(axes["Rotations"].lines) == 2
    assert len(axes["NMSE of the mean"].lines) == 1
    assert len(axes["Exposed waits"].patches) == 4
    out = tmp_path / "both.png"
    run(*files, out=out)
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "run.csv", nmse=False, steps=3)
    lines = path.read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    for row in rows:
        row[9] = row[10] = ""  # exposed, rotations
    path.write_text("\n".join([lines[0], *map(",".join, rows), "3,1,10"]))  # which was killed
    runs = read_runs([path])
    axes = drawn(runs)
    assert "NMSE of the mean" not in axes
    assert len(axes["Time per step"].lines) == 0
    assert [text.get_text() for text in axes["Exposed waits"].texts] == ["not measured"]
    assert runs[0].figures()["steps"] == "3"
    assert "training waited (median step)" not in runs[0].figures()
    run(path)


def test_steps_that_are_done_again_count_once(tmp_path: Path) -> None:
    path = write(tmp_path / "run.csv", steps=4)
    header, *rows = path.read_text().splitlines()
    each = len(rows) // 4
    again = [*rows, *rows[each:], *rows[2 * each :]]  # back to step 1, then to step 2
    path.write_text("\n".join([header, *again, ""]))
    (run_again,) = read_runs([path])
    (once,) = read_runs([write(tmp_path / "once.csv", steps=4)])
    assert all(
        np.array_equal(run_again.rows[name], once.rows[name], equal_nan=True) for name in once.rows
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,train_loss\n1,2\n", "has no column bucket; give a file that register"),
        ("", "has no column step; give a file that register"),
        (f"{','.join(telemetry.COLUMNS)}\n", "has no rows; the run finished no step"),
        (f"{','.join(telemetry.COLUMNS)}\n{'x,' * 12}x\n", "is damaged: could not convert"),
        (f"{','.join(telemetry.COLUMNS)}\n1,2\n3,4\n", "is damaged: a row has 2 of 13 columns"),
        (f"{','.join(telemetry.COLUMNS)}\n{'1,' * 12}inf\n", "is damaged: a number is infinite"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        run(path)


def test_what_cannot_be_done_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "run.csv", steps=1)
    with pytest.raises(ValueError, match=r"--out run.pdf must end in .html or .png"):
        run(path, out=Path("run.pdf"))
    with pytest.raises(ValueError, match=r"nowhere.run\.png: there is no folder"):
        run(path, out=tmp_path / "nowhere" / "run.png")
    with pytest.raises(ValueError, match=r"\. cannot be read"):
        run(Path())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'rhtcomm\[plot\]'"):
        run(path)
