"""DiLoCo between two sites at 100 Mbit/s: the loss and the time that outer steps cost, compressed.

    python benchmarks/diloco.py                      all of it (root; about an hour)
    python benchmarks/diloco.py --contestants float32 rht4 --seeds 5
    python benchmarks/diloco.py --quick

Each contestant trains the model of `make demo`, at half its learning rate, with the same seeds and
data, on two ranks that launch/network.sh connects; "ddp" by launch/train_ddp.py, the others apart,
with an outer step every 20 steps (rhtcomm.hooks.OuterAverager, the outer optimizer of DiLoCo). All
contestants run with one seed before the next seed's turn. Losses are of the same number of inner
steps, each paired with that of uncompressed outer steps with the same seed. Times of outer steps
begin after a barrier, so that they hold no waiting for a slower rank's training. With --keep,
summaries of the same settings that exist already are used again.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.machine import machine
from lib.processes import ROOT, TRAINER, execute, on_links
from lib.progress import progress
from lib.report import RESULTS, read_csv, table, write_csv
from rhtcomm.hooks import OuterAverager

sys.path.append(str(ROOT / "launch"))

from data import draw_batch, load_corpus
from model import GPT, learning_rate, loss_of, make_optimizer

DDP, BASE = "ddp", "float32"
CONTESTANTS: dict[str, dict[str, Any]] = {
    DDP: {},
    BASE: {"min_numel": 1 << 30},
    "rht4": {"bits": 4},
    "rht2": {"bits": 2},
    "ecdq2": {"bits": 2, "quantizer": "ecdq"},
    "float32 delay 5": {"min_numel": 1 << 30, "delay": 5},
    "rht4 delay 5": {"bits": 4, "delay": 5},
    "rht4 delay 5, 4 fragments": {"bits": 4, "delay": 5, "fragments": 4},
}
LAYERS, WIDTH, HEADS, CONTEXT, BATCH, LR = 4, 160, 5, 128, 8, 2e-3
EVAL_BATCHES = 8


# ---- One rank -----------------------------------------------------------------------------------


def train(task: dict[str, Any]) -> dict[str, Any]:
    """One rank of a contestant without DDP; what came out."""
    seed, steps, rank = task["seed"], task["steps"], dist.get_rank()
    training, validation = load_corpus(Path(sysconfig.get_path("stdlib")))
    torch.manual_seed(seed)
    gpt = GPT(LAYERS, WIDTH, HEADS)
    optimizer = make_optimizer(gpt, LR)
    seconds: list[float] = []
    with OuterAverager(gpt, period=task["period"], seed=seed, **task["options"]) as outer:
        for number in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, steps, steps // 8, LR)
            loss_of(gpt, *draw_batch(training, BATCH, CONTEXT, (seed, number, rank))).backward()
            nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (number + 1) % task["period"] == 0 and not task["options"].get("delay"):
                dist.barrier()
            started = time.perf_counter()
            outer.step()
            seconds.append(time.perf_counter() - started)
        if task["options"].get("delay"):
            outer.synchronize()
        stats = outer.stats()
    check_alike(gpt)
    rounds = steps // task["period"]
    return {
        "loss": validate(gpt, validation, rank),
        "outer_seconds": sum(seconds) / rounds,
        "codec_seconds": (stats.encode_seconds + stats.decode_seconds) / rounds,
        "exchange_seconds": stats.exchange_seconds / rounds,
        "bytes": stats.bytes_sent,
        "parameters": sum(parameter.numel() for parameter in gpt.parameters()),
    }


def validate(gpt: GPT, data: Tensor, rank: int) -> float:
    """Mean loss over the validation batches of all ranks, those of launch/train_ddp.py."""
    with torch.no_grad():
        losses = [
            loss_of(gpt, *draw_batch(data, BATCH, CONTEXT, (index, rank)))
            for index in range(EVAL_BATCHES)
        ]
    total = torch.stack(losses).double().mean()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def check_alike(gpt: GPT) -> None:
    """Raise AssertionError unless all ranks end with the same bits."""
    flat = torch.cat([parameter.detach().view(-1) for parameter in gpt.parameters()])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    if not all(torch.equal(other, flat) for other in others):
        raise AssertionError("the ranks ended with other parameters")


def run_rank(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    outcome = train(task)
    if dist.get_rank() == 0:
        Path(task["summary"]).write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()


# ---- All runs -----------------------------------------------------------------------------------


def run(seed: int, contestant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What came out of one contestant's training with one seed, by rank 0."""
    settings = [seed, contestant, arguments.link, arguments.steps, arguments.period]
    settings += [CONTESTANTS[contestant], LAYERS, WIDTH, HEADS, CONTEXT, BATCH, LR]
    digest = blake2b(json.dumps(settings).encode(), digest_size=3).hexdigest()
    summary = arguments.logs / f"{contestant.replace(' ', '-')}-{seed}-{digest}.json"
    if not (arguments.keep and summary.is_file()):
        if contestant == DDP:
            run_ddp(seed, summary, arguments)
        else:
            task = {"seed": seed, "steps": arguments.steps, "period": arguments.period}
            task |= {"options": CONTESTANTS[contestant], "summary": str(summary)}
            command = [*on_links(2, arguments.link), __file__, "--task", json.dumps(task)]
            execute(command)
    outcome: dict[str, Any] = json.loads(summary.read_text())
    return outcome


def run_ddp(seed: int, summary: Path, arguments: argparse.Namespace) -> None:
    log, theirs = summary.with_suffix(".csv"), summary.with_suffix(".trainer")
    options = f"--layers {LAYERS} --width {WIDTH} --heads {HEADS} --context {CONTEXT}".split()
    options += f"--batch {BATCH} --lr {LR} --steps {arguments.steps} --seed {seed}".split()
    options += f"--warmup {arguments.steps // 8} --eval-every {arguments.steps}".split()
    options += f"--eval-batches {EVAL_BATCHES} --threads 1 --bucket-cap-mb 100".split()
    options += ["--backend", "gloo", "--hook", "none", "--csv", str(log), "--summary", str(theirs)]
    execute([*on_links(2, arguments.link), TRAINER, *options])
    rows, told = read_csv(log), json.loads(theirs.read_text())
    per_step = statistics.median(float(row["comm_seconds"]) for row in rows[3:])
    outcome = {
        "loss": told["final_val_loss"],
        "outer_seconds": per_step * arguments.period,
        "codec_seconds": math.nan,
        "exchange_seconds": per_step * arguments.period,
        "bytes": sum(int(row["bytes_sent"]) for row in rows),
        "parameters": told["parameters"],
    }
    summary.write_text(json.dumps(outcome))


def figures(runs: dict[str, list[dict[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """A row of the results for each contestant."""

    def median(name: str, what: str) -> float:
        return statistics.median(outcome[what] for outcome in runs[name])

    rows = []
    for name, outcomes in runs.items():
        pairs = zip(outcomes, runs[BASE], strict=False)
        changes = [100 * (ours["loss"] / theirs["loss"] - 1) for ours, theirs in pairs]
        spread = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
        row = {
            "contestant": name,
            "seeds": len(outcomes),
            "loss": f"{statistics.fmean(outcome['loss'] for outcome in outcomes):.4f}",
            "percent_of_float32": f"{statistics.fmean(changes):.3f}",
            "standard_error": f"{spread:.3f}",
            "kilobytes_per_step": f"{median(name, 'bytes') / steps / 1e3:.2f}",
            "seconds_per_period": f"{median(name, 'outer_seconds'):.4f}",
            "exchange_seconds": f"{median(name, 'exchange_seconds'):.4f}",
            "codec_seconds": f"{median(name, 'codec_seconds'):.4f}",
        }
        for other in (DDP, BASE):
            ratio = math.nan
            if other in runs:
                ratio = median(name, "outer_seconds") / median(other, "outer_seconds")
            row[f"of_{other}"] = f"{ratio:.4f}"
        rows.append(row)
    return rows


def change_of(row: dict[str, Any]) -> str:
    """Of the loss, in percent, and its standard error where there are several seeds."""
    if row["contestant"] == BASE:
        return ""
    error = f" ± {row['standard_error']}" if row["seeds"] > 1 else ""
    return f"{float(row['percent_of_float32']):+.2f}%{error}"


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    header = ["", "seeds", "loss", f"against {BASE}", "KB sent per step", "s per period"]
    header += ["of DDP's", f"of {BASE}'s", "exchange, s", "codec, s"]
    cells = [
        [
            row["contestant"],
            str(row["seeds"]),
            row["loss"],
            change_of(row),
            row["kilobytes_per_step"],
            row["seconds_per_period"],
            row[f"of_{DDP}"],
            row[f"of_{BASE}"],
            row["exchange_seconds"],
            "" if row["codec_seconds"] == "nan" else row["codec_seconds"],
        ]
        for row in rows
    ]
    return f"""# benchmarks/diloco.py

{machine()}. 2 ranks with one thread each, joined by {arguments.link}; {arguments.steps} inner \
steps of the demo's model (AdamW, half the demo's learning rate), an outer step every \
{arguments.period} (SGD, lr 0.7, Nesterov momentum 0.9).

Loss: validation, nats per byte, mean over seeds. "Against" uncompressed outer steps: mean of the
differences by seed, ± its standard error. All ranks ended with the same bits (checked).
Seconds per period: communication that training waits for in {arguments.period} inner steps, median
over seeds. For DDP that is the time from the first gradient bucket to the last mean, in each step.
For the others it is the whole outer step: read, encode, exchange, decode and set the parameters.
With delay most of the exchange is hidden. Exchange: the part spent waiting for messages. Load
average at the end, {os.getloadavg()[0]:.1f}; the excess over the number of ranks is other work,
which slows everything except the link.

{table(header, cells)}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--link", default="100mbit")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--period", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ddp-seeds", type=int, default=2, help="its runs take longest")
    parser.add_argument("--delay-seeds", type=int, default=3, help="of contestants with delay")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--logs", type=Path, default=Path("demo-results/diloco"))
    parser.add_argument("--keep", action="store_true", help="use summaries that are there already")
    parser.add_argument("--quick", action="store_true", help="1gbit, 20 steps, 1 seed")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run_rank(arguments.task)
        return
    if arguments.quick:
        arguments.link, arguments.steps, arguments.period = "1gbit", 20, 10
        arguments.seeds = 1
        arguments.out = arguments.logs = arguments.logs.with_name("diloco-quick")
    if BASE not in arguments.contestants:
        arguments.contestants.insert(0, BASE)
    for folder in (arguments.logs, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.contestants}
    turns = list(itertools.product(range(arguments.seeds), arguments.contestants))
    most = {
        name: arguments.ddp_seeds if name == DDP else arguments.delay_seeds
        for name in CONTESTANTS
        if name == DDP or "delay" in CONTESTANTS[name]
    }
    turns = [turn for turn in turns if turn[0] < most.get(turn[1], arguments.seeds)]
    for seed, contestant in progress(turns, keep=True):
        runs[contestant].append(run(seed, contestant, arguments))
    rows = figures(runs, arguments.steps)
    write_csv(arguments.out / "diloco.csv", rows)
    text = report(rows, arguments)
    (arguments.out / "diloco.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
