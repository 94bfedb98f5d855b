"""Where the time of a bucket goes."""

import time
from typing import Any, Literal

import torch
from torch.autograd import profiler

__all__ = ["Clock", "Part"]

Part = Literal["encode", "exchange", "decode"]

# record_function takes longer than all else around a part.
_named_range: Any = getattr(
    torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function
)


class Clock:
    """Adds up the seconds of each part of an exchange, and names the parts in profiles.

    Exactly one part runs at a time; `part` says which one, None outside of an exchange, so that an
    error tells what it came from.
    """

    __slots__ = ("_range", "_since", "part", "seconds")

    def __init__(self) -> None:
        self.part: Part | None = None
        self.seconds: dict[str, float] = {}
        self._since = 0.0
        self._range: Any = None
        self.restart()

    def restart(self) -> None:
        """Forget the seconds so far."""
        if self.part is not None:  # an error came in between
            self.to(None)
        self.seconds = {"encode": 0.0, "exchange": 0.0, "decode": 0.0}

    def to(self, part: Part | None) -> None:
        """End what runs, and begin `part`."""
        if part == self.part:
            return
        now = time.perf_counter()
        if self.part is not None:
            self.seconds[self.part] += now - self._since
        self.part, self._since = part, now
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if part is not None and profiler._is_profiler_enabled:
            self._range = _named_range(f"rhtcomm::{part}")
            self._range.__enter__()
