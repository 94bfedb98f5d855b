"""The best number of warps of a Triton program, measured on the device."""

import math
from collections.abc import Callable
from functools import partial
from threading import Lock

import torch
from triton.runtime.errors import OutOfResources, PTXASError

__all__ = ["Tuner"]


class Tuner:
    """Remembers the fastest number of warps for each kernel and shape.

    The number of warps does not change any bit of payloads and means, so the timed launches also do
    the work. They block the host and compile the kernel several times. Only one thread at a time
    measures. Others do not wait for it, since it waits for a device whose work may depend on them.
    """

    least = 64  # programs: a launch with fewer, such as a tail's, takes no time

    def __init__(self) -> None:
        self.fastest: dict[tuple[object, ...], int] = {}
        self._tuning = Lock()

    def warps(
        self,
        what: tuple[object, ...],
        guess: int,
        size: int,
        device: torch.device,
        launch: Callable[[int], None],
    ) -> int:
        """The number of warps for `what`, a kernel and its shape, and blocks of `size`.

        `launch` runs the kernel with a number of warps. The result is `guess` until a better one is
        known.
        """
        if what not in self.fastest and self.can_time(device) and self._tuning.acquire(False):
            try:
                if what not in self.fastest:  # by now
                    self.fastest[what] = self._tuned(guess, size, launch)
            finally:
                self._tuning.release()
        return self.fastest.get(what, guess)

    def _tuned(self, guess: int, size: int, launch: Callable[[int], None]) -> int:
        some = {max(1, guess // 2), guess, min(16, 2 * guess), min(16, 4 * guess)}
        # A thread has 255 registers.
        candidates = sorted(warps for warps in some if size // (32 * warps) <= 128)
        seconds = {warps: self.seconds(partial(launch, warps)) for warps in candidates}
        return min(candidates, key=seconds.__getitem__)

    def can_time(self, device: torch.device) -> bool:
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def seconds(self, call: Callable[[], None]) -> float:
        """Time of one of several calls on the current stream; infinity if the device lacks the
        resources."""
        try:
            call()  # compiles
        except (OutOfResources, PTXASError):
            return math.inf
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # cycles, until all calls are queued: the host is slower
        start.record()
        for _ in range(5):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 5e3
