"""Models that `fully_shard` was called on, their data, and what tests ask of their gradients."""

from typing import Any

import torch
import torch.distributed as dist
from models import Probe, mlp
from problems import numbers
from states import TIMEOUT
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

WIDTHS = (48, 100, 50, 10)  # which 4 ranks cannot share out evenly
# Compresses every unit, finely enough to compare gradients: their error is about 0.7%.
FINE: dict[str, Any] = {
    "bits": 8,
    "block": 256,
    "min_numel": 0,
    "timeout": TIMEOUT,
    "warmup_steps": 0,
}
CLOSE = 0.02  # relative, of gradients by FINE; those of other ranks, or of one, are off by about 1


def net(seed: int = 0) -> nn.Module:
    """The same on all ranks; three linear layers."""
    torch.manual_seed(seed)
    return mlp(*WIDTHS)


def sharded(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """Each linear layer is a unit, and so is what is left."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def probe(*numels: int, **options: Any) -> nn.Module:
    """One unit, whose gradients are the tensors that it is called with."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(Probe(*numels, **options), mesh=mesh)


def layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def loss(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    output: torch.Tensor = model(numbers(rank, step, shape=(8, WIDTHS[0])))
    return output.float().square().mean()


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole ones, by name, on all ranks."""
    return {
        name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None
    }


def backward(model: nn.Module, rank: int, step: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model, rank, step).backward()
    return gradients(model)


def exact_mean(
    model: nn.Module, ranks: list[int], step: int, plain: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Of what `backward` gives on these ranks, by a plain model in float64."""
    plain = (net() if plain is None else plain).double()
    plain.load_state_dict({name: whole(p).double() for name, p in model.state_dict().items()})
    own = []
    for rank in ranks:
        plain.zero_grad()
        plain(numbers(rank, step, shape=(8, WIDTHS[0])).double()).square().mean().backward()
        own.append(gradients(plain))
    return {name: torch.stack([g[name] for g in own]).mean(0) for name in own[0]}


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> list[float]:
    """Relative ones, of each gradient."""
    assert found.keys() == exact.keys()
    return [((found[k].double() - x).norm() / x.norm()).item() for k, x in exact.items()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
