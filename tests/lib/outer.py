"""Models whose ranks train apart, for tests of outer steps."""

from typing import Any

import torch
from problems import numbers
from states import BLOCK, TIMEOUT
from torch import nn

from rhtcomm.hooks import OuterAverager

__all__ = ["averager", "everything", "mean_of_models", "normed", "train", "wander"]


def normed(seed: int = 0) -> nn.Module:
    """The same on all ranks; 13472 parameters in 6 tensors, takes (batch, 64) to (batch, 64)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 64))


def mean_of_models(anchors: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(anchors, lr=1.0)


def averager(model: nn.Module, optimizer: Any = None, **options: Any) -> OuterAverager:
    """Compresses whatever there is, in small blocks."""
    settings: dict[str, Any] = {"min_numel": 0, "block": BLOCK, "timeout": TIMEOUT}
    return OuterAverager(model, optimizer, **{**settings, **options})


def wander(model: nn.Module, rank: int, step: int, scale: float = 0.01) -> None:
    """What an inner step might do, different on every rank."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += scale * numbers(rank, step, i, shape=tuple(parameter.shape))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    """An inner step on data of this rank."""
    x = numbers(rank, step, shape=(16, 64))
    (model(x) - x.roll(1, 1)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module) -> torch.Tensor:
    """Parameters and floating buffers, one behind the other, float64."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [x.detach().double().reshape(-1) for x in tensors if x.is_floating_point()]
    return torch.cat(kept)
