"""Finds the DDP model of a state, and the names of its parameters."""

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "ddp_in",
    "group_of_model",
    "model_given",
    "named_parameters",
    "numel_of",
    "pairs_in",
    "plain_name",
    "ranks_of",
    "unwrapped",
]

# Prefixes that wrappers add to the names of modules and parameters.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def ddp_in(model: nn.Module, owner: str) -> DistributedDataParallel:
    """The DDP model that a model is, or wraps: torch.compile, Fabric and Accelerate do.

    Raises:
        TypeError: there is none, or the model uses another kind of data parallelism.
        ValueError: there are several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{owner}: model={model!r:.80} must be a model in DistributedDataParallel, such as "
            "DistributedDataParallel(model)"
        )
    found = [one for one in model.modules() if isinstance(one, DistributedDataParallel)]
    if len(found) > 1:
        raise ValueError(
            f"{owner}: the model holds {len(found)} DistributedDataParallel models; call it for "
            "each one"
        )
    if found:
        return found[0]
    sharded = [one for one in model.modules() if _is_sharded(one)]
    if sharded:
        raise TypeError(
            f"{owner}: the model is sharded ({type(sharded[0]).__name__}); call "
            "rhtcomm.hooks.compress_fsdp(model) instead"
        )
    raise TypeError(
        f"{owner}: this {type(model).__name__} contains no DistributedDataParallel; wrap the model "
        "first: DistributedDataParallel(model)"
    )


def _is_sharded(module: nn.Module) -> bool:
    """Whether it is a module of FSDP1 or FSDP2, without importing their classes."""
    names = {kind.__name__ for kind in type(module).__mro__}
    return not names.isdisjoint({"FullyShardedDataParallel", "FSDPModule"})


def numel_of(parameter: torch.Tensor) -> int:
    """Number of coordinates of its gradient in a bucket."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def named_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model by their names without wrappers' prefixes."""
    named = unwrapped(model).named_parameters()
    return {plain_name(name): parameter for name, parameter in named}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def plain_name(name: str) -> str:
    """The name of a module or parameter without wrappers' prefixes."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def pairs_in(kept: WeakTensorKeyDictionary) -> list[tuple[torch.Tensor, Any]]:
    """A snapshot of parameters and their values, while the worker thread may add others."""
    alive = [parameter for ref in kept.keyrefs() if (parameter := ref()) is not None]
    return [(parameter, kept[parameter]) for parameter in alive]


def model_given(model: nn.Module | None, call: str) -> nn.Module:
    """The model; raises ValueError if it is None."""
    if model is None:
        raise ValueError(
            "RHTState: with error_feedback or equalize, the state is saved by parameter name; "
            f"call {call}"
        )
    return model


def ranks_of(group: dist.ProcessGroup | None) -> list[int]:
    return dist.get_process_group_ranks(group)


def group_of_model(
    state: object, parameters: Sequence[torch.Tensor] = ()
) -> tuple[dist.ProcessGroup | None, list[DistributedDataParallel]]:
    """The process group of the DDP model that a state is registered on, if found, and the model, or
    several.

    DDP does not tell its hook the group. So, at the first bucket, search once for the model that
    refers to the state or, if the state is inside another object, to the first parameter.

    Raises:
        ValueError: there are several, and they average over different ranks.
    """

    def find() -> list[DistributedDataParallel]:
        pairs = [pair for pair in gc.get_referrers(state) if type(pair) is tuple]
        mine = [model for pair in pairs for model in _models_with(pair, "_comm_hooks")]
        return mine or _models_with(parameters[0], "_module_parameters") if parameters else mine

    mine = find()
    if not mine and gc.get_freeze_count():  # gc.freeze() hides them
        gc.unfreeze()
        mine = find()
        gc.freeze()
    groups = [group for model in mine if (group := getattr(model, "process_group", None))]
    if any(group is not groups[0] and ranks_of(group) != ranks_of(groups[0]) for group in groups):
        raise ValueError(
            "RHTState: it is registered on models that average over different ranks "
            f"({ranks_of(groups[0])} and others); give each model its own state"
        )
    return groups[0] if groups else None, mine


def _models_with(thing: object, name: str) -> list[DistributedDataParallel]:
    """The models that have the object in their list of this name.

    Not from gc.get_objects(): it would add references to tensors that are about to be freed (torch
    2.9).
    """
    found = []
    for holder in gc.get_referrers(thing):
        if type(holder) is not list:
            continue
        owners = gc.get_referrers(holder)
        owners += [
            one for owner in owners if type(owner) is dict for one in gc.get_referrers(owner)
        ]
        found += [
            owner
            for owner in owners
            if issubclass(type(owner), DistributedDataParallel)
            and getattr(owner, name, None) is holder
        ]
    return found
