"""Saving and loading an OuterAverager."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Saved", "read", "saved_optimizer", "to_torch"]

_CALL = "rhtcomm.hooks.OuterAverager.load_state_dict"
_KEYS = {"seed", "step", "inner_steps", "anchors", "buffers", "optimizer", "exchanged", "in_flight"}

Named = Mapping[str, torch.Tensor]


class Saved(NamedTuple):
    """The checked result of `OuterAverager.state_dict`."""

    inner_steps: int
    began: list[int]
    """The inner step after which each fragment was last exchanged."""
    anchors: Named
    buffers: Named
    optimizer: Mapping[str, Any]
    flights: list[tuple[int, int, list[torch.Tensor], list[torch.Tensor]]]
    """For each exchange in flight: fragment, due, starts and changes by part."""


def saved_optimizer(optimizer: torch.optim.Optimizer, anchors: nn.Module) -> dict[str, Any]:
    """The optimizer's state by the names of the anchors.

    SGD creates momenta in its first step. Before it they are saved as zeros, so that a new averager
    has all names that `torch.distributed.checkpoint` loads.
    """
    plain, names = optimizer.state_dict(), _names(optimizer, anchors)
    state = {names[i]: dict(values) for i, values in plain["state"].items()}
    parameters = dict(anchors.named_parameters())
    for group in plain["param_groups"] if isinstance(optimizer, torch.optim.SGD) else ():
        for i in group["params"] if group["momentum"] and not group["dampening"] else ():
            momenta = state.setdefault(names[i], {})
            if momenta.get("momentum_buffer") is None:
                momenta["momentum_buffer"] = torch.zeros_like(parameters[names[i]]).detach()
    kept = sum(len(values) for values in state.values())
    return {"state": state, "param_groups": plain["param_groups"], "kept": kept}


def to_torch(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, anchors: nn.Module
) -> dict[str, Any]:
    """The result of `saved_optimizer`, in the form of the optimizer's own `load_state_dict`."""
    numbers = {name: i for i, name in enumerate(_names(optimizer, anchors))}
    state = {numbers[name]: values for name, values in saved["state"].items()}
    return {"state": state, "param_groups": saved["param_groups"]}


def _names(optimizer: torch.optim.Optimizer, anchors: nn.Module) -> list[str]:
    """The names of the anchors, in the optimizer's order."""
    name_of = {id(anchor): name for name, anchor in anchors.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


def read(
    state: object,
    anchors: Named,
    buffers: Named,
    optimizer: Mapping[str, Any],
    own: str,
    lengths: Sequence[Sequence[int]],
) -> Saved:
    """Check a saved state.

    Args:
        anchors, buffers, optimizer: as they are now.
        own: the name under which this rank saved its exchanges in flight.
        lengths: of each fragment's parts.

    Raises:
        ValueError: it is not a saved state, or does not fit.
    """
    if not isinstance(state, Mapping) or not state.keys() >= _KEYS:
        this = f"has {list(state)}" if isinstance(state, Mapping) else f"is {state!r:.80}"
        raise ValueError(f"{_CALL}: pass what state_dict() returned; this {this}")
    _check_alike("anchors", state["anchors"], anchors)
    _check_alike("buffers", state["buffers"], buffers)
    _check_optimizer(state["optimizer"], optimizer, anchors)
    try:
        inner_steps = operator.index(state["inner_steps"])
        began = [*map(operator.index, state["exchanged"])]
        flights = [(operator.index(f), operator.index(due)) for f, due in state["in_flight"]]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{_CALL}: inner_steps is {state['inner_steps']!r:.80}, exchanged "
            f"{state['exchanged']!r:.80} and in_flight {state['in_flight']!r:.80}; pass what "
            "state_dict() returned"
        ) from error
    if len(began) != len(lengths):
        raise ValueError(
            f"{_CALL}: it was saved with fragments={len(began)}, but this averager has "
            f"{len(lengths)}; use the same number"
        )
    tensors = state.get(own, {})
    if flights and not tensors:
        raise ValueError(
            f"{_CALL}: {len(flights)} exchange(s) were in flight when it was saved, but {own!r}, "
            "which this rank needs, is missing; load on each rank what it saved with torch.save, "
            "or save when no exchange is in flight (torch.distributed.checkpoint skips entries "
            "that a new averager lacks)"
        )
    found = []
    for i, (fragment, due) in enumerate(flights):
        starts, changes = (tensors[str(i)][what] for what in ("starts", "changes"))
        numbers = [tensor.numel() for tensor in starts]
        expected = [*lengths[fragment]]
        if numbers != expected:
            raise ValueError(
                f"{_CALL}: fragment {fragment} was in flight with {numbers} numbers, but here it "
                f"has {expected}; use the model that it was saved for"
            )
        found.append((fragment, due, starts, changes))
    named = (state["anchors"], state["buffers"], state["optimizer"])
    return Saved(inner_steps, began, *named, found)


def _check_alike(what: str, saved: Any, here: Named) -> None:
    """Raise ValueError unless the names and shapes are those of this model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in here.items()}
    given = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in dict(saved).items()}
    odd = sorted(
        name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)
    )
    if odd:
        raise ValueError(
            f"{_CALL}: {what} of another model: {odd[0]} was saved with shape "
            f"{given.get(odd[0], 'none')}, but this model has {shapes.get(odd[0], 'none')}; use "
            "the model that it was saved for"
        )


def _check_optimizer(saved: Any, here: Mapping[str, Any], anchors: Named) -> None:
    numbers, expected = (
        [len(group["params"]) for group in one["param_groups"]] for one in (saved, here)
    )
    if numbers != expected or not saved["state"].keys() <= anchors.keys():
        raise ValueError(
            f"{_CALL}: the outer optimizer had groups of {numbers} parameters when it was saved, "
            f"but now has {expected}; create it as it was then"
        )
    kept = sum(len(values) for values in saved["state"].values())
    if kept != saved["kept"]:
        raise ValueError(
            f"{_CALL}: the outer optimizer held {saved['kept']} values when it was saved, but here "
            f"are {kept}; torch.distributed.checkpoint skips values that a new optimizer has not "
            "created yet: save with torch.save"
        )
