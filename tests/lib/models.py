"""Models in DDP, their data, and what tests ask of their gradients."""

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from problems import numbers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm.hooks import RHTState, rht_hook

# What makes torch free DDP's buckets after each step, from 2.15 on.
LAZY: dict[str, Any] = {"lazy_bucket_allocation": True}
if not LAZY.keys() <= inspect.signature(DistributedDataParallel).parameters.keys():
    LAZY = {}


def mlp(*widths: int, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def net(seed: int = 0) -> nn.Module:
    """The same on all ranks; takes (batch, 32) to (batch, 8)."""
    torch.manual_seed(seed)
    return mlp(32, 64, 8)


class Probe(nn.Module):
    """Parameters of these lengths or shapes; their gradients are what it is called with."""

    def __init__(self, *shapes: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(shape, dtype=dtype) for shape in shapes])

    def forward(self, *gradients: torch.Tensor) -> torch.Tensor:
        terms = [(w * g).sum() for w, g in zip(self.weights, gradients, strict=True)]
        return torch.stack(terms).sum()


class EarlyBranches(nn.Module):
    """One of two branches, as the first input says; DDP's last buckets are of one."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([mlp(32, 48, 64), mlp(32, 32, 64)])
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.branches[int(x[0, 0] > 0)](x).tanh())
        return result


def wrapped(model: nn.Module, state: Any, hook: Any = rht_hook, **options: Any) -> Any:
    """The model in DDP, with the hook registered."""
    ddp = DistributedDataParallel(model, **options)
    ddp.register_comm_hook(state, hook)
    return ddp


def probe_backward(state: RHTState, *gradients: torch.Tensor, **options: Any) -> str | None:
    """One backward pass that hands these gradients to the hook; the error that came out of it."""
    model = Probe(*(g.numel() for g in gradients), dtype=gradients[0].dtype)
    ddp = wrapped(model, state, **options)
    try:
        ddp(*gradients).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def backward(ddp: nn.Module, rank: int, step: int = 0) -> torch.Tensor:
    """The gradients of `net` after one backward pass on this rank's data, flat."""
    ddp.zero_grad()
    ddp(numbers(rank, step, shape=(16, 32))).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in ddp.parameters()])


def in_backward(call: Callable[[], object]) -> None:
    """Call something within a backward pass."""

    def hook(gradient: torch.Tensor) -> None:
        call()

    x = torch.ones(1, requires_grad=True)
    x.register_hook(hook)
    x.clone().backward()


def exact_mean(model: nn.Module, members: list[int], step: int = 0) -> torch.Tensor:
    """Of what `backward` gives on these ranks without DDP."""
    plain = copy.deepcopy(model)
    return torch.stack([backward(plain, rank, step) for rank in members]).mean(0)


def task_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Learn a fixed linear map of (batch, 32) to (batch, 8)."""
    target = x @ numbers(0, shape=(32, 8)) / 6
    difference: torch.Tensor = model(x) - target
    return difference.square().mean()


def descend(model: nn.Module, rate: float = 0.05) -> None:
    """A step of gradient descent."""
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=rate)
                p.grad = None


def train(model: nn.Module, ddp: nn.Module, rank: int, steps: range) -> None:
    """Steps of `task_loss`, on other data in each and on each rank."""
    for step in steps:
        task_loss(ddp, numbers(rank, step, shape=(16, 32))).backward()
        descend(model)


def parameters_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def gradients_of(model: nn.Module) -> torch.Tensor:
    """All gradients, zero where there is none."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.float().flatten() for g in gradients])


def error_of_mean(mean: torch.Tensor, own: torch.Tensor) -> float:
    """|mean - exact|^2 / (mean over ranks of |own|^2), on every rank of the world."""
    exact, power = own / dist.get_world_size(), own.square().sum() / dist.get_world_size()
    dist.all_reduce(exact)
    dist.all_reduce(power)
    return ((mean - exact).square().sum() / power).item()


def all_equal(tensors: list[torch.Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors)
