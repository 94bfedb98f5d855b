"""Time to a validation loss on emulated links, and what a training step's time is made of.

    python benchmarks/training.py                      all of it (root; about 35 minutes)
    python benchmarks/training.py --links 1gbit --contestants float32 rht4
    python benchmarks/training.py --quick

Each contestant trains the model of `make demo`, at half its learning rate, by launch/train_ddp.py,
with the same seeds and data, on ranks that launch/network.sh connects. All contestants run with one
seed before the next seed's turn, so what slows the machine for a while slows all of them. Time is
the sum of the steps' times, without evaluations. With --keep, logs of the same settings that exist
already are used again, so that an interrupted run can continue.
"""

import argparse
import itertools
import json
import math
import os
import statistics
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lib.machine import machine
from lib.processes import TRAINER, execute, on_links
from lib.progress import progress
from lib.report import RESULTS, read_csv, table, write_csv

CONTESTANTS = {
    "float32": "--hook none",
    "fp16": "--hook fp16",
    "bf16": "--hook bf16",
    "powersgd4": "--hook powersgd --powersgd-rank 4",
    "rht4": "--hook rht --bits 4",
    "rht4auto": "--hook rht --bits 4 --rotations auto",
    "rht2": "--hook rht --bits 2",
    "ecdq4": "--hook rht --bits 4 --quantizer ecdq",
    "ecdq2": "--hook rht --bits 2 --quantizer ecdq",
}
# At the demo's learning rate, 4e-3, the loss of some seeds jumps early, whatever the hook.
MODEL = "--layers 4 --width 160 --heads 5 --context 128 --batch 8 --lr 2e-3"


@dataclass(frozen=True)
class Run:
    """One contestant's training on one link with one seed, from its log and summary."""

    link: str
    contestant: str
    rows: list[dict[str, str]]
    summary: dict[str, Any]

    @property
    def final_loss(self) -> float:
        return self.curve[-1][1]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Seconds of training, validation loss."""
        seconds = itertools.accumulate(float(row["step_seconds"]) for row in self.rows)
        return [
            (time, float(row["val_loss"]))
            for time, row in zip(seconds, self.rows, strict=True)
            if row["val_loss"]
        ]

    def seconds_to(self, loss: float) -> float:
        """When the loss was first reached, on the line between evaluations; infinity if never."""
        for (start, above), (end, below) in itertools.pairwise(self.curve):
            if below <= loss:
                return start + (end - start) * max(0.0, (above - loss) / (above - below))
        return math.inf

    @property
    def codec_ms(self) -> float:
        """Encoding and decoding of a step, on the worker thread; NaN for other hooks."""
        if not self.summary["rht"]:
            return float("nan")
        stats = self.summary["rht"]
        return 1e3 * (stats["encode_seconds"] + stats["decode_seconds"]) / stats["steps"]


def train(seed: int, link: str, contestant: str, arguments: argparse.Namespace) -> Run:
    # PowerSGD hangs on Gloo with more than one bucket; the others hide what they can.
    cap = "100" if contestant.startswith("powersgd") else str(arguments.bucket_cap_mb)
    warmup, interval = arguments.steps // 8, max(1, arguments.steps // 20)
    options = [*CONTESTANTS[contestant].split(), *MODEL.split(), "--seed", str(seed)]
    options += ["--steps", str(arguments.steps), "--warmup", str(warmup)]
    options += ["--eval-every", str(interval), "--threads", "1", "--bucket-cap-mb", cap]
    if arguments.hook_warmup is not None:
        options += ["--hook-warmup", str(arguments.hook_warmup)]
    settings = " ".join([str(arguments.ranks), *options])
    digest = blake2b(settings.encode(), digest_size=3).hexdigest()
    name = f"{link}-{contestant}-{seed}-{digest}"
    log, summary = (arguments.logs / f"{name}.{suffix}" for suffix in ("csv", "json"))
    if not (arguments.keep and summary.is_file()):
        command = [*on_links(arguments.ranks, link), TRAINER, "--backend", "gloo", *options]
        execute([*command, "--csv", str(log), "--summary", str(summary)])
    return Run(link, contestant, read_csv(log), json.loads(summary.read_text()))


def median_ms(runs: list[Run], column: str) -> float:
    return 1e3 * statistics.median(float(row[column]) for run in runs for row in run.rows[3:])


def figures(runs: list[Run], target: float) -> list[dict[str, Any]]:
    """A row of the results for each link and contestant."""
    found = []
    for link, contestant in dict.fromkeys((run.link, run.contestant) for run in runs):
        group = [run for run in runs if (run.link, run.contestant) == (link, contestant)]
        losses = [run.final_loss for run in group]
        step, exposed = (median_ms(group, name) for name in ("step_seconds", "exposed_seconds"))
        sent = statistics.median(int(row["bytes_sent"]) for run in group for row in run.rows)
        values = {
            "link": link,
            "contestant": contestant,
            "seeds": len(group),
            "final_loss": f"{statistics.median(losses):.4f}",
            "lowest": f"{min(losses):.4f}",
            "highest": f"{max(losses):.4f}",
            "seconds_to_loss": f"{statistics.median(run.seconds_to(target) for run in group):.2f}",
            "step_ms": f"{step:.1f}",
            "compute_ms": f"{step - exposed:.1f}",
            "exposed_ms": f"{exposed:.1f}",
            "codec_ms": f"{statistics.median(run.codec_ms for run in group):.1f}",
            "megabytes_sent": f"{sent / 1e6:.3f}",
        }
        found.append(values)
    return found


def report(rows: list[dict[str, Any]], target: float, arguments: argparse.Namespace) -> str:
    cells = []
    for row in rows:
        base = [r for r in rows if r["link"] == row["link"] and r["contestant"] == "float32"]
        ratio = ""
        if base:
            ratio = f"{float(row['seconds_to_loss']) / float(base[0]['seconds_to_loss']):.2f}"
        loss = f"{row['final_loss']} ({row['lowest']} .. {row['highest']})"
        times = [row["step_ms"], row["compute_ms"], row["exposed_ms"]]
        times.append("" if row["codec_ms"] == "nan" else row["codec_ms"])
        names = [row["link"], row["contestant"]]
        sent = row["megabytes_sent"]
        cells.append([*names, loss, row["seconds_to_loss"], ratio, *times, sent])
    header = ["link", "gradients", "final loss", "to the loss, s", "of float32's", "step, ms"]
    header += ["compute", "exposed", "codec", "MB sent per step"]
    return f"""# benchmarks/training.py

{machine()}. {arguments.ranks} ranks with one thread each, {arguments.steps} steps of \
the demo's model at half its learning rate, buckets of {arguments.bucket_cap_mb:g} MiB \
(PowerSGD: one bucket), {arguments.seeds} seed(s).

Time to reach a validation loss of {target:.4f}, the highest final loss of all contestants.
Times and final losses (lowest .. highest) are medians over seeds. Load average at the end,
{os.getloadavg()[0]:.1f}; the excess over the number of ranks is other work, which slows the
compute of the runs it coincides with. Step times are medians on rank 0. Exposed: from the last
gradient until the backward pass returns. Codec: encoding and decoding, partly hidden by the
backward pass.

{table(header, cells, left=(0, 1, 2))}"""


def plot(runs: list[Run], target: float, path: Path) -> None:
    links = list(dict.fromkeys(run.link for run in runs))
    figure = Figure(figsize=(5.5 * len(links), 4), layout="tight")
    for axis, link in zip(figure.subplots(1, len(links), squeeze=False)[0], links, strict=True):
        drawn: set[str] = set()
        for run in runs:
            if run.link == link:
                color = f"C{list(CONTESTANTS).index(run.contestant)}"
                label = None if run.contestant in drawn else run.contestant
                drawn.add(run.contestant)
                axis.plot(*zip(*run.curve, strict=True), color=color, label=label, linewidth=1)
        axis.axhline(target, color="0.7", linewidth=0.8)
        axis.set(xlabel="seconds of training", ylabel="validation loss, nats per byte", title=link)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--links", nargs="+", default=["100mbit", "1gbit"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bucket-cap-mb", type=float, default=1.0)
    parser.add_argument("--hook-warmup", type=int, help="the trainer's; default: its own")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--logs", type=Path, default=Path("demo-results/training"))
    parser.add_argument("--keep", action="store_true", help="use logs that are there already")
    parser.add_argument("--quick", action="store_true", help="1gbit, 20 steps, 1 seed")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.links, arguments.steps, arguments.seeds = ["1gbit"], 20, 1
        arguments.out = arguments.logs = arguments.logs.with_name("training-quick")
    for folder in (arguments.logs, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    turns = itertools.product(range(arguments.seeds), arguments.links, arguments.contestants)
    runs = [train(*turn, arguments) for turn in progress(list(turns), keep=True)]
    groups = [[r.final_loss for r in runs if r.contestant == c] for c in arguments.contestants]
    target = max(map(statistics.median, groups))
    rows = figures(runs, target)
    write_csv(arguments.out / "training.csv", rows)
    text = report(rows, target, arguments)
    (arguments.out / "training.md").write_text(text)
    plot(runs, target, arguments.out / "training.png")
    print(text)


if __name__ == "__main__":
    main()
