"""A cache that builds each value once, even if several threads ask at the same time."""

import os
from collections.abc import Callable
from functools import cache, wraps
from threading import RLock
from typing import ParamSpec, TypeVar

__all__ = ["once"]

P = ParamSpec("P")
R = TypeVar("R")

# One lock for all caches, so that values that are built from each other cannot deadlock.
_lock = RLock()

# A child of fork() has one thread; the lock must not stay held by a thread that it lacks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def once(build: Callable[P, R]) -> Callable[P, R]:
    """`functools.cache` that runs `build` once per set of arguments and always returns that value.

    `functools.cache` alone runs it in every thread that misses, and returns values that it does not
    keep; a pointer into such a value dangles. A hit costs as much as with `functools.cache` and
    takes no lock. Exceptions are not cached.

    `build` runs under a lock that all these caches share, so it must not wait for other threads, or
    for work on a device that may depend on them.
    """
    kept = cache(build)

    @cache  # its hits need no lock; threads that miss at once all get what `kept` holds
    @wraps(build)
    def value(*args: P.args, **kwargs: P.kwargs) -> R:
        with _lock:
            return kept(*args, **kwargs)  # type: ignore[arg-type]

    return value  # type: ignore[return-value]
