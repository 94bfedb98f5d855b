"""A cache whose values are built once, whichever threads ask at the same time."""

import os
from collections.abc import Callable
from functools import cache, wraps
from threading import RLock
from typing import ParamSpec, TypeVar

__all__ = ["once"]

P = ParamSpec("P")
R = TypeVar("R")

# One for all caches, so that values built out of each other cannot be waited for in a circle.
_lock = RLock()

# A child of fork() has one thread: the lock must not be left to one that it lacks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def once(build: Callable[P, R]) -> Callable[P, R]:
    """`functools.cache` that runs `build` once for each set of arguments, and returns one value.

    `functools.cache` alone runs it in every thread that misses, and hands out values that it does
    not keep: a pointer into one of those dangles. A hit costs what one of `functools.cache` does
    and takes no lock. An exception is not kept.

    `build` runs under a lock that all these caches share, so it must not wait for other threads,
    nor for work on a device that may depend on them.
    """
    kept = cache(build)

    @cache  # its hits need no lock; threads that miss at once all get what `kept` holds
    @wraps(build)
    def value(*args: P.args, **kwargs: P.kwargs) -> R:
        with _lock:
            return kept(*args, **kwargs)  # type: ignore[arg-type]

    return value  # type: ignore[return-value]
