"""What compression costs in loss: paired trainings with AdamW and SGD.

    python benchmarks/quality.py                  all of it, hours; goes on where it was stopped
    python benchmarks/quality.py --minutes 20     a part of it
    python benchmarks/quality.py --problems sequences --contestants float32 'QUIC-FL*'
    python benchmarks/quality.py --quick          few steps and seeds, in a minute

Two ranks train each problem of lib/problems.py by DistributedDataParallel over Gloo. For one seed
all contestants begin with the same weights and draw the same batches, so each loss is compared with
that of float32 and the same seed: the mean of these differences is given with its 95% interval. Of
the final loss the interval is often wide, since noise decides when the loss falls; that of the mean
training loss over all steps is narrower. Both are kept in results/quality.csv; what it has is not
run again. `digits` needs scikit-learn
(the extra `benchmarks`).
"""

import argparse
import csv
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import rhtcomm.hooks
from lib.problems import PROBLEMS, Problem, learning_rate
from lib.processes import execute, torchrun
from lib.progress import progress
from lib.report import RESULTS, heading, read_csv, table

RANKS, SEEDS = 2, 8
OPTIMIZERS = ("AdamW", "SGD")
BASE = "float32"

# Contestants --------------------------------------------------------------------------------------

Register = Callable[[DistributedDataParallel, int, ExitStack], None]  # of a model, a seed


def plain(ddp: DistributedDataParallel, seed: int, stack: ExitStack) -> None:
    pass


def bfloat16(ddp: DistributedDataParallel, seed: int, stack: ExitStack) -> None:
    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return default_hooks.bf16_compress_hook(state, bucket)  # itself DDP takes on CUDA alone

    ddp.register_comm_hook(None, hook)


def power_sgd(ddp: DistributedDataParallel, seed: int, stack: ExitStack) -> None:
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=4, start_powerSGD_iter=10, random_seed=seed
    )
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def by_rhtcomm(options: dict[str, object]) -> Register:
    def register(ddp: DistributedDataParallel, seed: int, stack: ExitStack) -> None:
        stack.enter_context(rhtcomm.hooks.register(ddp, seed=seed, min_numel=0, **options))

    return register


def contestants() -> dict[str, Register]:
    found = {BASE: plain, "bfloat16": bfloat16, "PowerSGD, rank 4": power_sgd}
    feedback = {"bits": 1, "quantizer": "eden", "error_feedback": True}
    found["EDEN with feedback, 1 bit"] = by_rhtcomm(feedback)
    for bits in (1, 2, 4):
        for name, quantizer in (("QUIC-FL", "quic_fl"), ("ECDQ", "ecdq")):
            options = {"bits": bits, "quantizer": quantizer}
            label = f"{name}, {bits} bit{'s' * (bits > 1)}"
            found[label] = by_rhtcomm(options)
            if bits > 1:
                found[f"{label}, no warm-up"] = by_rhtcomm(options | {"warmup_steps": 0})
    found["QUIC-FL, 4 bits, equalized"] = by_rhtcomm({"bits": 4, "equalize": True})
    ecdq = {"bits": 2, "quantizer": "ecdq", "equalize": True}
    found["ECDQ, 2 bits, equalized"] = by_rhtcomm(ecdq)
    return found


# Trainings ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training; what quality.csv has a row for."""

    problem: str
    optimizer: str
    seed: int
    contestant: str


@dataclass(frozen=True)
class Losses:
    """What is compared."""

    final: float
    """On what was held out, after the last step."""
    path: float
    """In training, the mean over all steps, on the batches of rank 0."""


def train(problem: Problem, optimizer: str, seed: int, register: Register, steps: int) -> Losses:
    """Train on all ranks together."""
    torch.manual_seed(seed)
    ddp = DistributedDataParallel(problem.make_model(), bucket_cap_mb=100)  # for PowerSGD: one
    rule = problem.optimizers[optimizer](ddp.module)
    rate = partial(learning_rate, steps=steps, warmup=problem.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(rule, rate)
    path = []
    with ExitStack() as stack:
        register(ddp, seed, stack)
        for step in range(steps):
            inputs, targets = problem.draw((seed, step, dist.get_rank()))
            rule.zero_grad()
            loss = problem.loss(ddp(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            rule.step()
            schedule.step()
            path.append(loss.item() - problem.optimum())
    return Losses(problem.score(ddp.module), statistics.fmean(path))


def turns(
    problems: Iterable[str], optimizers: Iterable[str], names: Iterable[str], seeds: int
) -> list[Run]:
    """Seed by seed, so that a part of them is a comparison too."""
    order = itertools.product(range(seeds), problems, optimizers, names)
    return [Run(problem, optimizer, seed, name) for seed, problem, optimizer, name in order]


def run_rank(arguments: argparse.Namespace, left: Collection[Run]) -> None:
    """One rank: the runs that are left, as far as the time goes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    end = time.monotonic() + 60 * arguments.minutes
    first, everybody = dist.get_rank() == 0, contestants()
    for run in progress(left, keep=True, shown=first):
        late = torch.tensor(time.monotonic() > end)
        dist.broadcast(late, 0)
        if late:
            break
        problem = PROBLEMS[run.problem]
        steps = arguments.steps or problem.steps
        losses = train(problem, run.optimizer, run.seed, everybody[run.contestant], steps)
        if first:
            keep(arguments.out / "quality.csv", run, losses)
    dist.destroy_process_group()


# Results ------------------------------------------------------------------------------------------

FIELDS = ("problem", "optimizer", "seed", "contestant", "final", "path")
Results = dict[Run, Losses]


def read(path: Path) -> Results:
    if not path.is_file():
        return {}
    found = {}
    for row in read_csv(path):
        run = Run(row["problem"], row["optimizer"], int(row["seed"]), row["contestant"])
        found[run] = Losses(float(row["final"]), float(row["path"]))
    return found


def keep(path: Path, run: Run, losses: Losses) -> None:
    """Add a row: a benchmark that is killed loses the run that it was at, and nothing else."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(asdict(run) | asdict(losses))


def students_t(freedom: int) -> float:
    """The 97.5% quantile of Student's distribution, within 0.1% from 4 degrees of freedom on.

    The Cornish-Fisher expansion of it (Abramowitz and Stegun, 26.7.5).
    """
    z, n = statistics.NormalDist().inv_cdf(0.975), freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Their mean, and half the length of its 95% interval."""
    count, mean = len(differences), math.fsum(differences) / len(differences)
    if count < 2:
        return mean, math.inf
    variance = math.fsum((one - mean) ** 2 for one in differences) / (count - 1)
    return mean, students_t(count - 1) * math.sqrt(variance / count)


def difference(pairs: Sequence[tuple[float, float]]) -> str:
    """Of (base, loss) of the same seed, in percent of the bases' mean."""
    level = statistics.fmean(base for base, _ in pairs)
    mean, half = interval([100 * (loss - base) / level for base, loss in pairs])
    cell = f"{mean:+.2f}% ± {half:.2f}"
    return cell if mean <= half else f"**{cell}**"  # NaN is bold


def cells(results: Results, problem: str, optimizer: str, contestant: str) -> list[str] | None:
    """Seeds, final loss, its difference from float32's over the same seeds, and the path's."""
    pairs = [
        (results[base], losses)
        for run, losses in results.items()
        if (run.problem, run.optimizer, run.contestant) == (problem, optimizer, contestant)
        and (base := replace(run, contestant=BASE)) in results
    ]
    if not pairs:
        return None
    final = statistics.fmean(losses.final for _, losses in pairs)
    row = [contestant, str(len(pairs)), f"{final:.4f}"]
    if contestant == BASE:
        return [*row, "", ""]
    return [
        *row,
        difference([(base.final, losses.final) for base, losses in pairs]),
        difference([(base.path, losses.path) for base, losses in pairs]),
    ]


def report(results: Results) -> str:
    parts = [
        heading(),
        f"{RANKS} ranks, Gloo. Differences from float32 with the same seed, in percent of its mean "
        "loss: mean over\nseeds and its 95% interval. Bold: worse, and not by chance. For "
        "regression, the loss is the excess over the\nminimum. The tables include runs that "
        "earlier commands left in quality.csv.\n",
    ]
    header = ["gradients", "seeds", "final loss", "against float32", "mean over all steps"]
    for problem, optimizer in dict.fromkeys((run.problem, run.optimizer) for run in results):
        rows = (cells(results, problem, optimizer, name) for name in contestants())
        found = table(header, [row for row in rows if row])
        parts.append(f"## {problem}, {optimizer}\n\n{found}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--contestants", nargs="+", default=["*"], help="shell patterns")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, help="instead of each problem's own number")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then no further run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two seeds of 10 steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps = 2, 10
        arguments.out = Path("demo-results/quality-quick")
    names = [
        name
        for name in contestants()
        if any(fnmatchcase(name, pattern) for pattern in [BASE, *arguments.contestants])
    ]
    path = arguments.out / "quality.csv"
    done = read(path)
    wanted = turns(arguments.problems, arguments.optimizers, names, arguments.seeds)
    left = [run for run in wanted if run not in done]
    if "RANK" in os.environ:
        run_rank(arguments, left)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if left:
        execute([*torchrun(RANKS), *sys.argv])
    text = report(read(path))
    (arguments.out / "quality.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
