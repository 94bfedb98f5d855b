"""What compression costs Transformers' Trainer with its default AdamW, on data without noise.

    pip install transformers==5.24.0 accelerate==1.15.0
    python benchmarks/trainer.py                  all of it, an hour; goes on where it was stopped
    python benchmarks/trainer.py --seeds 2 --contestants '* 4 bits'

GPT-2 of two layers and 64 channels learns the arithmetic progressions of `sequences` in quality.py,
with the Trainer's own model, optimizer, clipping, order of batches and dropout: 200 steps, 2 ranks
over Gloo. It registers the hook as a user would, in a callback. Losses, pairs and intervals are
those of quality.py; rows go to results/trainer.csv.
"""

import argparse
import os
import statistics
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

import rhtcomm.hooks
from lib.problems import SYMBOLS, sequences
from lib.processes import execute, torchrun
from lib.progress import progress
from lib.report import RESULTS, heading, table
from quality import BASE, RANKS, Losses, Run, cells, keep, read

STEPS = 200
PROBLEM = ("Trainer", "AdamW")


def contestants() -> dict[str, dict[str, Any] | None]:
    """Options of `register`; None: no hook."""
    found: dict[str, dict[str, Any] | None] = {BASE: None}
    for bits in (4, 2):
        for name, quantizer in (("QUIC-FL", "quic_fl"), ("ECDQ", "ecdq")):
            options = {"bits": bits, "quantizer": quantizer}
            found[f"{name}, {bits} bits"] = options
            found[f"{name}, {bits} bits, no warm-up"] = options | {"warmup_steps": 0}
    alone = {"bits": 4, "warmup_steps": 0}
    found["QUIC-FL, 4 bits, no warm-up, c_attn exact"] = alone | {"exclude": ["*c_attn.weight"]}
    vectors = ["*.bias", "*ln_*"]
    found["QUIC-FL, 4 bits, no warm-up, norms and biases exact"] = alone | {"exclude": vectors}
    found["QUIC-FL, 4 bits, equalized"] = {"bits": 4, "equalize": True}
    found["ECDQ, 2 bits, equalized"] = {"bits": 2, "quantizer": "ecdq", "equalize": True}
    return found


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """The model shifts labels itself, so they are the inputs."""

    def __init__(self) -> None:
        inputs, targets = sequences()
        self.x = torch.cat([inputs, targets[:, -1:]], dim=1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.x[index], "labels": self.x[index]}


class Compress(TrainerCallback):  # type: ignore[misc]
    """Registers the hook on what the Trainer has wrapped, and closes it."""

    trainer: Trainer

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        # What callbacks are given as `model` is the one inside of DistributedDataParallel.
        self.handle = rhtcomm.hooks.register(self.trainer.model_wrapped, **self.options)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.handle.close()


def train(seed: int, options: dict[str, Any] | None, folder: str) -> Losses:
    set_seed(seed)
    config = GPT2Config(
        vocab_size=SYMBOLS,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = Sequences()
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    if options is not None:
        compress = Compress(seed=seed, **options)
        compress.trainer = trainer
        trainer.add_callback(compress)
    trainer.train()
    path = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.model.eval()
    with torch.no_grad():
        final = model(input_ids=data.x, labels=data.x).loss.item()
    return Losses(final, statistics.fmean(map(float, path)))


def run_rank(left: list[Run], out: Path) -> None:
    torch.set_num_threads(1)
    everybody = contestants()
    with tempfile.TemporaryDirectory() as folder:
        for run in progress(left, keep=True, shown=os.environ["RANK"] == "0"):
            losses = train(run.seed, everybody[run.contestant], folder)
            if dist.get_rank() == 0:
                keep(out, run, losses)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--contestants", nargs="+", default=["*"], help="shell patterns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = [
        name
        for name in contestants()
        if any(fnmatchcase(name, pattern) for pattern in [BASE, *arguments.contestants])
    ]
    rows = arguments.out / "trainer.csv"
    done = read(rows)
    wanted = [Run(*PROBLEM, seed, name) for seed in range(1, arguments.seeds + 1) for name in names]
    left = [run for run in wanted if run not in done]
    if "RANK" in os.environ:
        run_rank(left, rows)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if left:
        execute([*torchrun(RANKS), *sys.argv])
    found = read(rows)
    header = ["gradients", "seeds", "final loss", "against float32", "mean over all steps"]
    lines = [line for name in contestants() if (line := cells(found, *PROBLEM, name))]
    text = f"""{heading()}
{RANKS} ranks, Gloo. Differences from float32 with the same seed, in percent of its mean loss:
mean over seeds and its 95% interval. Bold: worse, and not by chance.

{table(header, lines)}"""
    (arguments.out / "trainer.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
