"""What `python -m rhtcomm bench --model` and `--step` run in tests/bench."""

import os
import signal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def small() -> tuple[nn.Module, object, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))

    def loss(model: nn.Module) -> torch.Tensor:
        x = torch.randn(4, 128)
        return (model(x) - x).square().mean()

    return model, loss, torch.optim.SGD(model.parameters(), 0.01)


def bench() -> tuple[DistributedDataParallel, object]:
    """Rank 1 is killed in its fifth step."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(64, 512))
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.randn(2, 64)).sum().backward()

    return model, step
