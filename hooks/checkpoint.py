"""Saving and loading an RHTState."""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..codec import AUTO, Codec
from ..lattice import Lattice
from ..randomness import Key

__all__ = ["Saved", "check_place", "read"]

_CALL = "RHTState.load_state_dict"


class Saved(NamedTuple):
    """The checked result of `RHTState.state_dict`."""

    key: Key
    wishes: dict[tuple[int, int], int]
    residuals: Mapping[str, torch.Tensor] | None
    place: tuple[int, int] | None
    """Rank and world size of the residuals, if there are any."""
    scales: Mapping[str, torch.Tensor]
    buckets: list[list[str]]


def read(state: object, codec: Codec | Lattice, error_feedback: bool) -> Saved:
    """Check a saved state.

    Raises:
        ValueError: it is not a saved state, or it and the present state differ in error
            feedback.
    """
    if not isinstance(state, Mapping) or not {"seed", "step"} <= state.keys():
        this = f"has {list(state)}" if isinstance(state, Mapping) else f"is {state!r:.80}"
        raise ValueError(
            f"{_CALL}: a state has seed and step, but this {this}; pass what state_dict() returned"
        )
    residuals = _residuals(state, error_feedback)
    place: Any = (state.get("rank"), state.get("world_size")) if residuals else None
    # The numbers saved by a run with "auto" are ignored if the number is fixed.
    wishes = _wishes(state.get("rotations", [])) if codec.rotations == AUTO else {}
    scales = _by_name(state, "scales") or {}
    key, buckets = Key(state["seed"], state["step"]), _buckets(state.get("buckets", []))
    return Saved(key, wishes, residuals, place, scales, buckets)


def check_place(saved: tuple[Any, Any] | None, own: tuple[int, int] | None) -> None:
    """Raise ValueError if residuals were saved by another rank, if both ranks are known."""
    if saved is None or (None not in saved and own in (None, saved)):
        return
    this = "" if own is None else f", but this is rank {own[0]} of {own[1]}"
    raise ValueError(
        f"{_CALL}: residuals differ between ranks, and these are from rank {saved[0]} of "
        f'{saved[1]}{this}; load on each rank what it saved, or drop them: state["residuals"] = '
        "{}"
    )


def _wishes(rows: Any) -> dict[tuple[int, int], int]:
    """The requested rotations, from rows of a bucket's number, its length and the number of
    rotations."""
    try:
        plain = [[operator.index(number) for number in row] for row in rows]
        wishes = {(index, numel): count for index, numel, count in plain}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{_CALL}: each row of rotations must hold a bucket's index, its length and a count, "
            f"but this has {rows!r:.80}; pass what state_dict() returned"
        ) from error
    if odd := {*wishes.values()} - {1, 2, 3}:
        raise ValueError(
            f"{_CALL}: rotations must be 1, 2 or 3, but this has {odd}; pass what state_dict() "
            "returned"
        )
    return wishes


def _buckets(rows: Any) -> list[list[str]]:
    """The names of the parameters in each bucket."""
    plain = isinstance(rows, list) and all(isinstance(names, list) and names for names in rows)
    names = [name for row in rows for name in row] if plain else [None]
    if not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise ValueError(
            f"{_CALL}: buckets must be lists of parameter names, without duplicates, but this has "
            f"{rows!r:.80}; pass what state_dict() returned"
        )
    return rows  # type: ignore[no-any-return]


def _by_name(state: Mapping[str, Any], what: str) -> Mapping[str, torch.Tensor] | None:
    values = state.get(what)
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(
            f"{_CALL}: {what} must be a dictionary of tensors by name, but this has "
            f"{values!r:.80}; pass what state_dict() returned"
        )
    return values


def _residuals(state: Mapping[str, Any], error_feedback: bool) -> Mapping[str, torch.Tensor] | None:
    residuals = _by_name(state, "residuals")
    if (residuals is not None) != error_feedback:
        raise ValueError(
            f"{_CALL}: error_feedback={error_feedback}, but what was saved has "
            f"{'no ' * (residuals is None)}residuals; create the state with the error_feedback of "
            "the saved run"
        )
    return residuals
