"""Train one small model several times on this machine and compare; run by `make demo`.

Model, seed, data and schedule are the same in all runs; only the exchange of gradients between the
two ranks differs. The results go to a folder: a log per run, the table and a plot.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

TRAINER = Path(__file__).resolve().parent / "train_ddp.py"


@dataclass(frozen=True)
class Run:
    name: str
    label: str
    arguments: tuple[str, ...]


# The other runs are compared with the first.
RUNS = (
    Run("float32", "float32, uncompressed", ("--hook", "none")),
    Run("bf16", "bfloat16", ("--hook", "bf16")),
    Run("rht4", "rhtcomm, 4 bits", ("--hook", "rht", "--bits", "4")),
    Run("rht2", "rhtcomm, 2 bits", ("--hook", "rht", "--bits", "2")),
    Run("ecdq2", "rhtcomm, 2 bits, ECDQ", ("--hook", "rht", "--bits", "2", "--quantizer", "ecdq")),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, help="default: 200, with --quick 40")
    parser.add_argument("--quick", action="store_true", help="smaller model and fewer steps")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="results' folder")
    args = parser.parse_args()
    if args.steps is None:
        args.steps = 40 if args.quick else 200
    return args


def train(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train on two ranks, with the trainer's progress on this terminal; return its summary."""
    layers, width, heads = (2, 64, 2) if args.quick else (4, 160, 5)
    eighth = args.steps // 8
    options = f"--layers {layers} --width {width} --heads {heads} --context 128 --batch 8"
    options += f" --steps {args.steps} --lr 4e-3 --warmup {eighth} --eval-every {max(1, eighth)}"
    options += " --threads 1 --backend gloo"
    log, summary = (args.out / f"{run.name}.{suffix}" for suffix in ("csv", "json"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TRAINER), *run.arguments, *options.split()]
    command += ["--csv", str(log), "--summary", str(summary)]
    finished = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if finished.returncode:
        raise SystemExit(
            f"The run '{run.label}' failed with exit code {finished.returncode}; see its output "
            "above."
        )
    content: dict[str, Any] = json.loads(summary.read_text())
    return content


def table(summaries: list[dict[str, Any]]) -> str:
    """The runs' figures in Markdown, relative to the first run."""
    baseline = summaries[0]
    lines = [
        "| gradients | validation loss | sent per step and rank | step | communication |",
        "|---|---|---|---|---|",
    ]
    for run, summary in zip(RUNS, summaries, strict=True):
        loss, sent = f"{summary['final_val_loss']:.4f}", f"{summary['bytes_per_step'] / 1e6:.3f} MB"
        if summary is not baseline:
            change = summary["final_val_loss"] / baseline["final_val_loss"] - 1
            loss += f" ({change:+.2%})"
            sent += f" (1/{baseline['bytes_per_step'] / summary['bytes_per_step']:.1f})"
        times = (summary[f"median_{what}_seconds"] * 1000 for what in ("step", "comm"))
        step, communication = (f"{milliseconds:.0f} ms" for milliseconds in times)
        lines.append(f"| {run.label} | {loss} | {sent} | {step} | {communication} |")
    return "\n".join(lines)


def plot(folder: Path) -> None:
    """Loss by step, and validation loss by bytes sent."""
    figure = Figure(figsize=(11, 4.5), layout="tight")
    by_step, by_bytes = figure.subplots(1, 2)
    for index, run in enumerate(RUNS):
        with (folder / f"{run.name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        steps = [int(row["step"]) for row in rows]
        train_loss = [float(row["train_loss"]) for row in rows]
        evaluated = [position for position, row in enumerate(rows) if row["val_loss"]]
        val_loss = [float(rows[position]["val_loss"]) for position in evaluated]
        megabytes = [
            sum(int(row["bytes_sent"]) for row in rows[: position + 1]) / 1e6
            for position in evaluated
        ]
        color = f"C{index}"
        by_step.plot(steps, train_loss, color=color, alpha=0.3, linewidth=0.8)
        val_steps = [steps[position] for position in evaluated]
        by_step.plot(val_steps, val_loss, "o-", color=color, label=run.label, markersize=3)
        by_bytes.plot(megabytes, val_loss, "o-", color=color, label=run.label, markersize=3)
    by_step.set(xlabel="step", ylabel="loss (nats per byte)", title="validation (training: thin)")
    by_bytes.set(xlabel="MB sent per rank", xscale="log", title="validation, over bytes sent")
    by_step.legend()
    figure.savefig(folder / "loss.png", dpi=150)


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    summaries = []
    for number, run in enumerate(RUNS, 1):
        print(f"\n[{number}/{len(RUNS)}] {run.label}", flush=True)
        summaries.append(train(run, args))

    first = summaries[0]
    report = (
        f"{first['parameters']:,} parameters, {args.steps} steps, two ranks with one thread each. "
        "Loss is in nats per byte; another seed alone changes it by a few percent. Times are "
        f"medians on rank 0.\n\n{table(summaries)}\n\nMeasured on {first['hardware']}, torch "
        f"{first['torch']}, over the loopback interface. Without a network between the ranks, step "
        "times show the cost of compression, not its savings on a real link.\n"
    )
    (args.out / "table.md").write_text(report)
    plot(args.out)
    print(f"\n{report}\nLogs, table.md and loss.png are in {args.out}.")


if __name__ == "__main__":
    main()
