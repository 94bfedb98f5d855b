"""What compression costs the loss of a model that FSDP2 shards.

    python benchmarks/fsdp_loss.py             5 seeds (6 minutes)
    python benchmarks/fsdp_loss.py --quick

The model of `make demo`, at half its learning rate, on two ranks: each block is a unit, and so is
what is left. All contestants train with the same seed and data, one after the other, and each loss
is paired with that of uncompressed gradients.
"""

import argparse
import math
import statistics
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diloco import BATCH, CONTEXT, HEADS, LAYERS, LR, WIDTH, validate
from lib.machine import machine
from lib.processes import ROOT, execute, torchrun
from lib.progress import progress
from lib.report import RESULTS, table
from rhtcomm.hooks import compress_fsdp

sys.path.append(str(ROOT / "launch"))

from data import draw_batch, load_corpus
from model import GPT, learning_rate, loss_of, make_optimizer

BASE = "float32"
CONTESTANTS: dict[str, dict[str, Any]] = {
    BASE: {"bits": 4, "min_numel": 1 << 30},
    "4 bits": {"bits": 4},
    "2 bits of ECDQ": {"bits": 2, "quantizer": "ecdq"},
}


def train(seed: int, steps: int, options: dict[str, Any], corpus: Any) -> tuple[float, float]:
    """The validation loss at the end, and how many times fewer bytes were sent."""
    training, validation = corpus
    torch.manual_seed(seed)
    gpt, rank = GPT(LAYERS, WIDTH, HEADS), dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in gpt.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(gpt, mesh=mesh)
    optimizer = make_optimizer(gpt, LR)
    with compress_fsdp(gpt, seed=seed, **options) as handle:
        for number in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, steps, steps // 8, LR)
            loss_of(gpt, *draw_batch(training, BATCH, CONTEXT, (seed, number, rank))).backward()
            nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return validate(gpt, validation, rank), handle.stats().compression_ratio


def report(outcomes: dict[str, list[tuple[float, float]]], steps: int) -> str:
    base = [loss for loss, _ in outcomes[BASE]]
    cells = []
    for name, found in outcomes.items():
        losses, ratios = zip(*found, strict=True)
        changes = [100 * (loss / exact - 1) for loss, exact in zip(losses, base, strict=True)]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
        change = "" if name == BASE else f"{statistics.fmean(changes):+.2f}% ± {error:.2f}"
        cells.append([name, f"{statistics.fmean(losses):.4f}", change, f"{ratios[0]:.1f}"])
    header = ["gradients", "loss", f"against {BASE}", "times fewer bytes"]
    return f"""# benchmarks/fsdp_loss.py

{machine()}. 2 ranks with one thread each; {steps} steps of the demo's model in FSDP2 \
(AdamW, half the demo's learning rate), {len(base)} seeds.

Loss: validation, nats per byte, mean over seeds; against {BASE}: mean of the changes seed by seed,
± its standard error. Bytes: of gradients alone; the first 64 steps have more bits.

{table(header, cells)}"""


def run_ranks(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    corpus, steps = load_corpus(Path(sysconfig.get_path("stdlib"))), arguments.steps
    outcomes: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
    turns = [(seed, name) for seed in range(arguments.seeds) for name in CONTESTANTS]
    for seed, name in progress(turns, "runs", keep=True, shown=dist.get_rank() == 0):
        outcomes[name].append(train(seed, steps, CONTESTANTS[name], corpus))
    if dist.get_rank() == 0:
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = report(outcomes, steps)
        (arguments.out / "fsdp_loss.md").write_text(text)
        print(text)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="20 steps, 1 seed")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps = 1, 20
        if arguments.out == parser.get_default("out"):
            arguments.out = Path("demo-results")
    if arguments.rank:
        run_ranks(arguments)
    else:
        execute([*torchrun(2), __file__, "--rank", *sys.argv[1:]])


if __name__ == "__main__":
    main()
