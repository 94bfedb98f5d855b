"""Train a byte-level GPT on the Python standard library, with a choice of gradient compression.

    torchrun --nproc-per-node=2 launch/train_ddp.py --hook rht --bits 4
    launch/mpirun.sh 2 --hook rht --bits 4

This file has the training loop. The model is in model.py, the data in data.py, the hooks and the
measurement of their time in communication.py, the command line in options.py, checkpoints in
checkpoint.py, and the log and the summary in log.py.
"""

import argparse
import dataclasses
import gc
import hashlib
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import agreed_checkpoint, gather, save_checkpoint, settings_of
from communication import MeasuredHook, bytes_of_step, elapsed, make_hook
from data import draw_batch, load_corpus
from log import Log, Step, hardware, medians, report
from model import GPT, learning_rate, loss_of, make_optimizer
from options import parse_args


@dataclasses.dataclass(frozen=True)
class Corpus:
    train: Tensor  # (bytes,) uint8
    validation: Tensor  # the same
    sha256: str  # of the training data, abbreviated

    @classmethod
    def load(cls) -> "Corpus":
        train, validation = load_corpus(Path(sysconfig.get_path("stdlib")))
        return cls(train, validation, hashlib.sha256(train.numpy().tobytes()).hexdigest()[:16])


class Trainer:
    """One rank's replica of the model, and everything that its steps need."""

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        corpus: Corpus,
        checkpoint: dict[str, Any] | None,
    ) -> None:
        self.args, self.device, self.corpus = args, device, corpus
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.compressed = args.hook == "rht"

        torch.manual_seed(args.seed)
        self.gpt = GPT(args.layers, args.width, args.heads).to(device)
        self.parameters = sum(parameter.numel() for parameter in self.gpt.parameters())
        self.optimizer = make_optimizer(self.gpt, args.lr)
        if checkpoint:
            self.gpt.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])

        self.model = DistributedDataParallel(
            self.gpt, bucket_cap_mb=args.bucket_cap_mb, gradient_as_bucket_view=True
        )
        self.hook_state, hook = make_hook(args)
        self.measured = MeasuredHook(hook, device)
        self.model.register_comm_hook(self.hook_state, self.measured.hook)
        if checkpoint and self.compressed:
            self.hook_state.load_state_dict(checkpoint["hook"][self.rank], self.gpt)

    def batch(self, data: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        inputs, targets = draw_batch(data, self.args.batch, self.args.context, key)
        return inputs.to(self.device), targets.to(self.device)

    def step(self, number: int) -> Step:
        """Train for one step; steps are numbered from 0."""
        args = self.args
        sent_before = self.hook_state.stats().bytes_sent if self.compressed else 0
        started = time.perf_counter()
        origin = self.measured.now()

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, args.steps, args.warmup, args.lr)
        loss = loss_of(self.model, *self.batch(self.corpus.train, args.seed, number, self.rank))
        loss.backward()
        backward_done = self.measured.now()
        nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        train_loss = loss.item()

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        step_seconds = time.perf_counter() - started
        comm_seconds = self.measured.take_seconds(origin)
        exposed_seconds = elapsed(self.measured.last_call, backward_done)
        if self.compressed:
            bytes_sent = self.hook_state.stats().bytes_sent - sent_before
        else:
            bytes_sent = bytes_of_step(args, self.hook_state, self.parameters, self.world_size)
        return Step(train_loss, step_seconds, comm_seconds, exposed_seconds, bytes_sent)

    def validate(self) -> float:
        """Mean loss over this rank's validation batches."""
        with torch.no_grad():
            losses = [
                loss_of(self.gpt, *self.batch(self.corpus.validation, index, self.rank)).item()
                for index in range(self.args.eval_batches)
            ]
        return statistics.fmean(losses)

    def hook_states(self) -> list[Any] | None:
        """On rank 0, the hook's states of all ranks; all ranks must call it."""
        states: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        if self.compressed:
            dist.gather_object(self.hook_state.state_dict(self.gpt), states)
        return states

    def summary(self, done: int, steps: list[Step], val_loss: float) -> str:
        """The run's figures as JSON after `done` steps, of which `steps` were run here."""
        rht = None
        if self.compressed:
            stats = self.hook_state.stats()
            rht = dataclasses.asdict(stats)
            rht |= {"compression_ratio": stats.compression_ratio, "nmse": stats.nmse}
        content = {
            "args": vars(self.args),
            "name": name_of(self.args),
            "steps": done,
            "world_size": self.world_size,
            "parameters": self.parameters,
            "final_val_loss": val_loss,
            "csv": self.args.csv,
            **medians(steps),
            "bytes_per_step": steps[-1].bytes_sent,
            "rht": rht,
            "corpus": {
                "train_bytes": len(self.corpus.train),
                "validation_bytes": len(self.corpus.validation),
                "sha256": self.corpus.sha256,
            },
            "torch": torch.__version__,
            "hardware": hardware(self.device),
        }
        return json.dumps(content, indent=2, default=str)


def train(args: argparse.Namespace) -> None:
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    corpus = Corpus.load()
    for path in filter(None, (args.csv, args.summary, args.checkpoint)):
        path.parent.mkdir(parents=True, exist_ok=True)

    settings = settings_of(args, dist.get_world_size(), corpus.sha256)
    checkpoint = agreed_checkpoint(args, settings, device)
    first_step = checkpoint["step"] if checkpoint else 0
    last_step = min(args.steps, args.stop_at or args.steps)
    if checkpoint and first_step >= last_step:
        if dist.get_rank() == 0:
            print(
                f"the checkpoint {args.checkpoint} is at step {first_step} and the run ends at "
                f"step {last_step}: nothing left to train"
            )
            if "summary" in checkpoint:  # not in those of earlier versions
                report(args, checkpoint["summary"])
        return

    trainer = Trainer(args, device, corpus, checkpoint)
    run_steps(trainer, settings, first_step, last_step)
    if trainer.compressed:
        trainer.hook_state.close()


def run_steps(trainer: Trainer, settings: dict[str, Any], first_step: int, last_step: int) -> None:
    """The steps from first_step to last_step - 1, with their evaluations, logs and checkpoints."""
    args, on_rank_0 = trainer.args, trainer.rank == 0
    log = Log(args.csv, first_step) if on_rank_0 and args.csv else None
    steps: list[Step] = []
    val_loss = math.nan
    progress = tqdm(
        range(first_step, last_step),
        desc=name_of(args),
        initial=first_step,
        total=last_step,
        disable=None if on_rank_0 else True,  # None: shown only on a terminal
    )
    for number in progress:
        step = trainer.step(number)
        steps.append(step)
        done = number + 1
        evaluate = done % args.eval_every == 0 or done == last_step
        losses = [step.train_loss, trainer.validate()] if evaluate else [step.train_loss]
        train_loss, *evaluated = mean_over_ranks(losses, trainer.device)
        val_loss = evaluated[0] if evaluate else val_loss
        save = args.checkpoint and (done % args.checkpoint_every == 0 or done == last_step)
        hook_states = trainer.hook_states() if save else None
        if not on_rank_0:
            continue

        progress.set_postfix(train=f"{train_loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
        if evaluate:
            progress.write(
                f"{name_of(args)}: step {done}/{args.steps}, loss {train_loss:.4f} in training, "
                f"{val_loss:.4f} in validation, {step.step_seconds:.3f} s per step",
                file=sys.stderr,
            )
        if log:
            log.write(done, step, train_loss, val_loss if evaluate else None)
        if save:
            content = {
                "config": settings,
                "step": done,
                "model": trainer.gpt.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                # For a restart that has nothing left to do.
                "summary": trainer.summary(done, steps, val_loss),
            }
            if trainer.compressed:
                content["hook"] = hook_states
            save_checkpoint(args.checkpoint, content)

    if on_rank_0:
        report(args, trainer.summary(last_step, steps, val_loss))


def name_of(args: argparse.Namespace) -> str:
    return f"rht, {args.bits} bits" if args.hook == "rht" else str(args.hook)


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    mean: list[float] = (total / dist.get_world_size()).tolist()
    return mean


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cuda":  # over Gloo, ranks may share a GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(args.backend)
    train(args)
    gather(None)  # a node whose ranks have ended cannot restart together with a node that fails now
    # DDP, its hook and the futures of the last step may refer to each other and to the group. Its
    # threads must end before Python does: they would request the lock of an interpreter that is
    # shutting down.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
