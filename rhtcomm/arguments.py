"""Checks of arguments that many functions share. `owner` is who was given them, for the error."""

import operator

__all__ = ["check_bool", "check_type", "integer", "natural", "number"]


def integer(value: object, owner: str, name: str) -> int:
    """A plain int, whatever integer was given; TypeError where it is none."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{owner}: {name}={value!r} must be an integer") from None


def natural(value: object, owner: str, name: str) -> int:
    """An integer that is not negative; TypeError or ValueError where it is none."""
    found = integer(value, owner, name)
    if found < 0:
        raise ValueError(f"{owner}: {name}={found} must not be negative")
    return found


def number(value: object, owner: str, name: str) -> float:
    """A plain int or float, whatever number was given; TypeError where it is none."""
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
