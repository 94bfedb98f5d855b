"""Argument checks that many functions share. `owner` names the called function in errors."""

import operator

__all__ = ["check_bool", "check_type", "integer", "natural", "number"]


def integer(value: object, owner: str, name: str) -> int:
    """Convert any integer to a plain int; raise TypeError if it is not one."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{owner}: {name}={value!r} must be an integer") from None


def natural(value: object, owner: str, name: str) -> int:
    """Convert any non-negative integer to a plain int; raise TypeError or ValueError otherwise."""
    found = integer(value, owner, name)
    if found < 0:
        raise ValueError(f"{owner}: {name}={found} must not be negative")
    return found


def number(value: object, owner: str, name: str) -> float:
    """Convert any number to a plain int or float; raise TypeError if it is not one."""
    if isinstance(value, float):
        return float(value)
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{owner}: {name}={value!r} must be a number") from None


def check_bool(value: object, owner: str, name: str) -> None:
    """Raise TypeError unless value is a bool."""
    if type(value) is not bool:
        raise TypeError(f"{owner}: {name}={value!r} must be True or False")


def check_type(value: object, kind: type, owner: str, name: str, example: str) -> None:
    """Raise TypeError unless value is a `kind`, such as `example`."""
    if not isinstance(value, kind):
        raise TypeError(f"{owner}: {name}={value!r} must be a {kind.__name__} such as {example}")
