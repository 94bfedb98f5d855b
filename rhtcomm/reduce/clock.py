"""The time of each part of an exchange."""

import time
from typing import Any, Literal

import torch
from torch.autograd import profiler

__all__ = ["Clock", "Part"]

Part = Literal["encode", "exchange", "decode"]

# record_function costs more than all other overhead of a part.
_named_range: Any = getattr(
    torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function
)


class Clock:
    """Adds up the seconds of each part of an exchange, and names the parts in profiles.

    One part runs at a time. `part` names it (None outside of an exchange), so that an error can be
    attributed to it.
    """

    __slots__ = ("_range", "_since", "part", "seconds")

    def __init__(self) -> None:
        self.part: Part | None = None
        self.seconds: dict[str, float] = {}
        self._since = 0.0
        self._range: Any = None
        self.restart()

    def restart(self) -> None:
        """Reset the seconds to zero."""
        if self.part is not None:  # after an error
            self.to(None)
        self.seconds = {"encode": 0.0, "exchange": 0.0, "decode": 0.0}

    def to(self, part: Part | None) -> None:
        """End the current part, and begin `part`."""
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
