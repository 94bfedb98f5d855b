"""Gradients of which parts are quiet, for tests of `equalize`."""

from typing import Any

import torch
from models import Probe, gradients_of
from problems import numbers
from states import BLOCK, TIMEOUT
from torch import nn

from rhtcomm.hooks import RHTState

SHAPES = ((96, 66), (40,), (60, 64))
QUIET = 6  # sizes 1, 1/2, ..., 1/32


def state_of(**options: Any) -> RHTState:
    given = {"bits": 4, "block": BLOCK, "min_numel": 0, "warmup_steps": 0, "equalize": True}
    timeout = None if "communicator" in options else TIMEOUT
    return RHTState(**given | {"timeout": timeout} | options)


def sizes() -> list[torch.Tensor]:
    """Of gradients: by column in the first matrix, by row in the second one."""
    columns = 2.0 ** -(torch.arange(66) % QUIET).float()
    rows = 2.0 ** -(torch.arange(60) % QUIET).float()
    return [columns.expand(96, 66), torch.full((40,), 0.25), rows[:, None].expand(60, 64)]


def gradients(
    rank: int, step: int, dtype: torch.dtype = torch.float32, factor: float = 1.0
) -> list[torch.Tensor]:
    found = []
    for i, size in enumerate(sizes()):
        own = (rank + 1) * numbers(rank, step, i, shape=tuple(size.shape))
        found.append((factor * size * own).to(dtype))
    return found


def flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def exact_mean(world_size: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    each = [flat(gradients(rank, step, dtype)).float() for rank in range(world_size)]
    return torch.stack(each).mean(0)


def backward(ddp: nn.Module, parts: list[torch.Tensor]) -> torch.Tensor:
    """The mean of these gradients, flat."""
    ddp.zero_grad()
    ddp(*parts).backward()
    return gradients_of(ddp)


def learn(state: RHTState, *parts: torch.Tensor) -> Probe:
    """A model whose scales were learned from these gradients."""
    model = Probe(*(tuple(part.shape) for part in parts), dtype=parts[0].dtype)
    assert state.scales is not None
    state.scales.learn(list(model.parameters()), flat(list(parts)))
    return model
