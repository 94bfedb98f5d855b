"""The log of a run, with a row per step, and its summary."""

import argparse
import csv
import json
import os
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

CSV_COLUMNS = (
    "step",
    "train_loss",
    "val_loss",
    "step_seconds",
    "comm_seconds",
    "exposed_seconds",
    "bytes_sent",
)

# The first steps allocate memory and open connections.
UNTIMED_STEPS = 3


@dataclass(frozen=True)
class Step:
    """The times and bytes of a step on this rank; communication.py explains the times."""

    train_loss: float  # of this rank's batch
    step_seconds: float
    comm_seconds: float
    exposed_seconds: float
    bytes_sent: int


class Log:
    """The file of --csv. Rows of an earlier run up to step `done` stay in it."""

    def __init__(self, path: Path, done: int) -> None:
        kept = list(logged_rows(path, done)) if done else []
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, CSV_COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(kept)

    def write(self, done: int, step: Step, train_loss: float, val_loss: float | None) -> None:
        """A row; the losses are means over ranks, val_loss is None without an evaluation."""
        self.writer.writerow(
            {
                "step": done,
                "train_loss": f"{train_loss:.6f}",
                "val_loss": "" if val_loss is None else f"{val_loss:.6f}",
                "step_seconds": f"{step.step_seconds:.6f}",
                "comm_seconds": f"{step.comm_seconds:.6f}",
                "exposed_seconds": f"{step.exposed_seconds:.6f}",
                "bytes_sent": step.bytes_sent,
            }
        )
        self.file.flush()


def logged_rows(path: Path, done: int) -> Iterator[dict[str, str]]:
    """The rows of a log up to a step; later steps will run again after the checkpoint."""
    if path.is_file():
        with path.open(newline="") as file:
            yield from (row for row in csv.DictReader(file) if int(row["step"]) <= done)


def medians(steps: list[Step]) -> dict[str, float]:
    """Medians of the times of the counted steps, by their names in the summary."""
    counted = steps[UNTIMED_STEPS:] or steps
    return {
        f"median_{name}": statistics.median(getattr(step, name) for step in counted)
        for name in ("step_seconds", "comm_seconds", "exposed_seconds")
    }


def report(args: argparse.Namespace, summary: str) -> None:
    """Print a run's figures, and write them to the file of --summary."""
    run = json.loads(summary)
    print(
        f"{run['name']}: {run['parameters']:,} parameters, {run['world_size']} ranks, "
        f"{run['steps']} steps, validation loss {run['final_val_loss']:.4f} nats per byte, "
        f"{run['median_step_seconds']:.3f} s per step (median), "
        f"{run['median_comm_seconds']:.3f} s of it communicating, "
        f"{run['bytes_per_step']:,} bytes sent per step and rank"
    )
    if args.summary:
        args.summary.write_text(summary + "\n")


def hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} CPU cores ({vectors}), {platform.platform()}"
