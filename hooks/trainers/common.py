"""Shared by the modules for trainers: register the hook, close it, and save its state."""

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..policy import Bits
from ..register import Handle, register
from ..state import RHTState

__all__ = [
    "abandon",
    "attach",
    "finish",
    "gathered",
    "load",
    "restore_rank",
    "save_rank",
    "state_of_all_ranks",
]


def attach(model: nn.Module, bits: Bits, options: dict[str, Any], owner: str, how: str) -> Handle:
    """Compress the gradients of the model that a trainer has wrapped.

    Args:
        model: in DDP, or sharded by FSDP2 or FSDP1. In a single process, any model: a warning says
            that there is nothing to send, and the returned handle has no hook.
        bits, options: of `rhtcomm.hooks.register`.
        owner: the called function, for errors.
        how: how to train with several processes and DDP, in the trainer's words.

    Raises:
        TypeError: several processes train a model that is neither in DDP nor sharded.
    """
    if _world_size() == 1:
        warnings.warn(
            f"{owner}: a single process sends no gradients, so nothing is compressed; to train "
            f"with several, {how}",
            stacklevel=3,
        )
        options = {name: value for name, value in options.items() if name != "replicate_group"}
        return Handle(model, RHTState(bits, **options))
    modules = list(model.modules())
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        return register(model, bits, **options)
    kinds = {kind.__name__ for module in modules for kind in type(module).__mro__}
    # By their names, since importing them takes seconds.
    if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
        from ..fsdp import compress_fsdp

        return compress_fsdp(model, bits, **options)
    raise TypeError(
        f"{owner}: {_world_size()} processes train a {type(model).__name__} that is neither in "
        f"DistributedDataParallel nor sharded by FSDP, so the hook cannot be registered; {how}"
    )


def finish(handle: Handle, trained: bool, owner: str, why: str) -> None:
    """Close the hook, and warn if the model trained without it.

    Args:
        handle: the hook's.
        trained: whether there were steps.
        owner: the called function, for the warning.
        why: the likely cause, in the trainer's words.
    """
    missed = trained and handle.stats().steps == 0 and _world_size() > 1
    with warnings.catch_warnings():
        # The warning below says the same in the trainer's words. Without steps there is none.
        warnings.filterwarnings("ignore", "the hook was never called")
        _end(handle)
    if missed:
        warnings.warn(
            f"{owner}: the hook was never called: gradients were not averaged, or not by the "
            f"hook; {why}",
            stacklevel=3,
        )


def abandon(handle: Handle) -> None:
    """Close the hook of a failed run, without hiding the run's error by another one.

    Args:
        handle: the hook's.
    """
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        _end(handle)


def _end(handle: Handle) -> None:
    """Close it, and leave a model that can train without it or register again (FSDP2)."""
    if handle.state.engine is None:  # one process
        handle.close()
    else:
        handle.remove()


# Saved states -----------------------------------------------------------------------------------


def state_of_all_ranks(handle: Handle) -> dict[str, Any]:
    """The state for a checkpoint that rank 0 writes and all ranks read; call it on all ranks.

    It is `handle.state_dict()`. With error feedback, rank 0's has the residuals of all ranks: the
    size of the model times the number of ranks. `handle.load_state_dict` accepts it on every rank.

    Args:
        handle: the hook's.
    """
    return gathered(handle.state_dict())


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """The result of `state_of_all_ranks`, from the result of `state_dict` on each rank.

    Args:
        state: this rank's.
    """
    if not any(name.startswith("residuals") for name in state) or _world_size() == 1:
        return state
    states: list[Any] | None = [None] * _world_size() if dist.get_rank() == 0 else None
    dist.gather_object(state, states)
    return _merged(states) if states else state


def load(handle: Handle, state: dict[str, Any]) -> None:
    """Load a saved state; call it on all ranks, or in a single process.

    Args:
        handle: the hook's.
        state: what `state_of_all_ranks` or `state_dict` returned.

    Raises:
        ValueError: see `Handle.load_state_dict`.
    """
    if handle.state.engine is None and handle.state.error_feedback:
        state = state | {"residuals": {}}
    handle.load_state_dict(state)


def save_rank(handle: Handle, folder: str | os.PathLike[str], name: str = "rhtcomm") -> None:
    """Write this rank's state into a checkpoint's folder, as NAME_rankR.pt.

    Args:
        handle: the hook's.
        folder: must exist.
        name: distinguishes several models of one run.
    """
    torch.save(handle.state_dict(), _file(folder, name, _rank()))


def restore_rank(handle: Handle, folder: str | os.PathLike[str], name: str = "rhtcomm") -> None:
    """Load what `save_rank` wrote; call it on all ranks.

    Ranks load the state of rank 0, and their own residuals. If there is none, the hook starts at
    its first step, with a warning.

    Args:
        handle: the hook's.
        folder: the one that `save_rank` wrote to.
        name: as passed to `save_rank`.

    Raises:
        ValueError: see `Handle.load_state_dict`.
    """
    # On several machines, each may have only the files of its own ranks.
    files = [file for rank in (0, _rank()) if (file := _file(folder, name, rank)).is_file()]
    if not files:
        warnings.warn(
            f"rhtcomm: {folder} has no state of the hook ({_file('', name, 0)}), so the hook "
            "starts at its first step, as in a new run",
            stacklevel=3,
        )
        return
    states = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
    load(handle, _merged(states))


def _merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The first state, with the residuals of all ranks, under names with the rank."""
    merged: dict[str, Any] = {}
    for state in reversed(states):
        merged |= state
    return merged


def _file(folder: str | os.PathLike[str], name: str, rank: int) -> Path:
    return Path(folder, f"{name}_rank{rank}.pt")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
