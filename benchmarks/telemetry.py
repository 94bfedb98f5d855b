"""What observers cost: steps of a small exchange with and without them, in turns within one run.

    torchrun --nproc-per-node=2 benchmarks/telemetry.py

A step is the backward pass of a DDP model whose only bucket has 64 KiB of float32 numbers, which
travel with 4 bits over Gloo. Steps of such a length vary by several percent, so the ratio of the
medians says little about parts of a percent; how little, the last row tells. `alone` is what the
observer takes by itself, for a bucket whose exchange is done: its report is made, handed over and
written.
"""

import argparse
import random
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rhtcomm
from lib.progress import progress
from lib.report import heading, table
from lib.timing import quantiles
from rhtcomm.hooks import BucketReport, register, telemetry
from rhtcomm.hooks.buckets import Bucket
from rhtcomm.hooks.cuda import Cuda
from rhtcomm.hooks.reports import Reports
from rhtcomm.hooks.stats import Totals
from rhtcomm.reduce import Report

NUMEL = 1 << 14  # float32 numbers: 64 KiB
Observer = Callable[[BucketReport], object]


def nothing(report: BucketReport) -> None:
    """The observer that takes the least."""


def contestants(folder: Path) -> dict[str, Observer | None]:
    return {
        "none": None,
        "a function that does nothing": nothing,
        "telemetry.csv": telemetry.csv(folder / "run.csv"),
        "telemetry.log, every 100": telemetry.log(),
        "telemetry.tensorboard, every 100": telemetry.tensorboard(folder / "runs"),
        "none, once more": None,
    }


class Numbers(nn.Module):
    """One parameter, whose gradient is what the model is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUMEL))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.dot(self.weight, gradient)


def step_with(observer: Observer | None) -> tuple[Callable[[], object], Any]:
    """A step, and the handle of its model."""
    ddp = DistributedDataParallel(Numbers())
    handle = register(ddp, bits=4, warmup_steps=0, observer=observer)
    gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        ddp(gradient).backward()

    return step, handle


def in_random_order(
    steps: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Quantiles of the time of each; the same order on all ranks.

    A step begins while what the one before left to the worker threads ends, so each contestant
    must follow each other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, names = random.Random(0), [*steps]
    for _ in progress(range(rounds)):
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: quantiles(times[rounds // 10 :]) for name, times in seconds.items()}


def seconds_alone(observer: Observer | None) -> float:
    """Of one bucket, the best of several runs."""
    if observer is None:
        return 0.0
    reports = Reports([observer], Totals())
    key, buffer = rhtcomm.Key(0, 1, 0), torch.zeros(NUMEL)
    report = Report(8000, 65536, 2, None, 1e-4, 2e-4, 1e-4, 4.0)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(buffer)
    bucket, cuda = Bucket(buffer, key, [buffer], ends=True), Cuda()

    def one() -> None:
        bucket.reports = [BucketReport.of(report, 0, key, NUMEL, 0.0, 0.0)]
        reports.add(bucket, done, cuda)
        reports.land()

    return min(timeit.repeat(one, number=1000, repeat=15)) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3000, help="steps of each contestant")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as folder:
        steps, handles = {}, []
        for name, observer in contestants(Path(folder)).items():
            steps[name], handle = step_with(observer)
            handles.append(handle)
        seconds = in_random_order(steps, rounds)
        for handle in handles:
            handle.close()
        dist.barrier()
        if dist.get_rank() == 0:
            alone = {name: seconds_alone(o) for name, o in contestants(Path(folder)).items()}
            print(f"{heading()}\n{text_of(seconds, alone)}")
    dist.barrier()
    dist.destroy_process_group()


def text_of(seconds: dict[str, tuple[float, float, float]], alone: dict[str, float]) -> str:
    """The table; the first contestant is what others are compared with."""
    _, base, _ = next(iter(seconds.values()))
    rows = [
        (
            name,
            f"{1e6 * median:.0f}",
            f"{1e6 * low:.0f} .. {1e6 * high:.0f}",
            f"{median / base:.3f}",
            f"{1e6 * alone[name]:.1f}",
            f"{alone[name] / base:.2%}",
        )
        for name, (low, median, high) in seconds.items()
    ]
    header = ("observer", "step, us", "10% .. 90%", "/ none", "alone, us", "alone / step")
    return table(header, rows)


if __name__ == "__main__":
    main()
