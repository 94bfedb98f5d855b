"""Gradients of the demo's model, trained on one rank; nothing is kept of it."""

import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

import torch

from lib.processes import ROOT
from lib.progress import progress

sys.path.append(str(ROOT / "launch"))  # whose scripts are no package

from data import draw_batch, load_corpus
from model import GPT, learning_rate, loss_of, make_optimizer

DEMO = (4, 160, 5)  # layers, width, heads
SMALL = (1, 64, 2)
PEAK_RATE = 4e-3


def gradients(model: tuple[int, int, int], steps: Collection[int]) -> dict[str, torch.Tensor]:
    """After some steps, by name; flat, parameters from last to first as DDP has them."""
    data, _ = load_corpus(Path(sysconfig.get_path("stdlib")))
    torch.manual_seed(0)
    gpt = GPT(*model)
    optimizer = make_optimizer(gpt, PEAK_RATE)
    last, found = max(steps), {}
    for step in progress(range(last), "training"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, last, max(1, last // 8), PEAK_RATE)
        inputs, targets = draw_batch(data, 8, 128, (0, step, 0))
        optimizer.zero_grad()
        loss_of(gpt, inputs, targets).backward()
        if step + 1 in steps:
            flat = [p.grad.flatten() for p in reversed(list(gpt.parameters()))]
            found[f"gradient, step {step + 1}"] = torch.cat(flat)
        optimizer.step()
    return found
