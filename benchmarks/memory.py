"""Resident memory that the hook adds over plain DDP, at its peak.

    python benchmarks/memory.py            (writes results/memory.md)

Each case is a run of its own processes on this machine, over Gloo: a model with --megabytes of
float32 gradients takes some steps. The peak is that of the resident memory (VmHWM of
/proc/self/status) from the first step on, whose only bucket is the whole model. What is added is
the difference from the peak of the same run without the hook, the largest over ranks. Plain DDP's
own peak differs by up to 150 MiB between runs, so medians of --runs are compared.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rhtcomm.hooks
from lib.processes import execute, torchrun
from lib.progress import progress
from lib.report import RESULTS, heading, table

STEPS = 4
LAYERS = 12
Case = dict[str, Any]


class Layers(nn.Module):
    """Parameters of equal length, each with a gradient of its own numbers."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(numel // LAYERS) for _ in range(LAYERS))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for weight in self.weights:
            total = total + torch.dot(weight, noise)
        return total


def peak(case: Case, numel: int) -> int:
    """Bytes of resident memory at the peak of some steps, beyond those before the first one."""
    torch.manual_seed(dist.get_rank())
    model, noise = Layers(numel), torch.randn(numel // LAYERS)
    ddp = DistributedDataParallel(
        model,
        bucket_cap_mb=case["bucket"],
        gradient_as_bucket_view=True,
    )
    options = case["options"]
    handle = None if options is None else rhtcomm.hooks.register(ddp, warmup_steps=0, **options)
    dist.barrier()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(STEPS):
        ddp(noise).backward()
    dist.barrier()
    found = _status("VmHWM") - before
    if handle is not None:
        handle.close()
    return found


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def run_rank(case: Case, numel: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = peak(case, numel)
    (folder / f"{dist.get_rank()}").write_text(str(found))
    dist.destroy_process_group()


def measure(case: Case, numel: int) -> float:
    """The largest peak of a rank, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--case", json.dumps(case), "--numel", str(numel), "--folder", folder]
        execute([*torchrun(case["ranks"]), __file__, *arguments])
        return max(int(path.read_text()) for path in Path(folder).iterdir()) / 2**20


def cases(quick: bool) -> list[Case]:
    found = []
    for ranks in (2, 4):
        for bucket in (25,) if quick else (25, 1000):
            for algorithm in ("all_gather", "two_shot"):
                for feedback in (False, True):
                    options = {"bits": 4, "algorithm": algorithm, "error_feedback": feedback}
                    found.append({"ranks": ranks, "bucket": bucket, "options": options})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200, help="of the gradients")
    parser.add_argument("--runs", type=int, default=5, help="of each case")
    parser.add_argument("--quick", action="store_true", help="only buckets of 25 MiB")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--numel", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        run_rank(json.loads(given.case), given.numel, given.folder)
        return
    numel = given.megabytes * 10**6 // 4
    gradients, rows = 4 * numel / 2**20, []
    peaks: dict[str, list[float]] = {}  # by case
    found = cases(given.quick)
    plain = [{**case, "options": None} for case in found if case["options"] == found[0]["options"]]
    for case in progress((plain + found) * given.runs, "runs", keep=True):
        peaks.setdefault(json.dumps(case), []).append(measure(case, numel))
    for case in found:
        options = case["options"]
        without = peaks[json.dumps({**case, "options": None})]
        least, added, most = (
            of(peaks[json.dumps(case)]) - statistics.median(without)
            for of in (min, statistics.median, max)
        )
        bound = 0.6 * gradients + 16 + (1.2 * gradients if options["error_feedback"] else 0)
        rows.append(
            [
                *(str(case["ranks"]), str(case["bucket"]), options["algorithm"]),
                "yes" if options["error_feedback"] else "no",
                f"{statistics.median(without):.0f} ({min(without):.0f} .. {max(without):.0f})",
                f"{'**' * (added > bound)}{added:+.0f}{'**' * (added > bound)} "
                f"({least:+.0f} .. {most:+.0f})",
                f"{bound:.0f}",
            ]
        )
    columns = ["ranks", "bucket_cap_mb", "algorithm", "error feedback"]
    columns += ["plain DDP, MiB", "added, MiB", "aim, MiB"]
    text = f"""{heading()}
{gradients:.0f} MiB of gradients, b = 4. Medians (least .. most) of {given.runs} runs.
Aim: 0.6 of the largest bucket, which is the whole model in the first step, plus 16 MiB; with error
feedback 1.2 times the gradients more. Bold: above it.

{table(columns, rows, left=(2, 3))}"""
    (RESULTS / "memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
