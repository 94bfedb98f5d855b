"""Checks of payloads on a device, deferred so that the host need not wait for the device."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch

from rhtcomm.wire import PayloadError

__all__ = ["DeferredChecks", "deferred_on"]


class DeferredChecks:
    """Checks of payloads on CUDA that do not block the host.

    Reading headers from a device blocks the host until the device has finished all queued work.
    Within `deferring()`, on the same thread, decoding instead queues a copy of the headers to
    pinned memory, 16 bytes per payload, and continues; `raise_failed` checks the copies that have
    arrived. Until then a result may be wrong, but nothing worse: kernels stay in bounds for any
    payload bytes. With rotations="auto", where headers say how to decode, they are read at once.
    """

    devices = ("cuda",)
    most = 4096  # pending checks; with more, the host waits for the oldest

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, Callable[[], object]]] = deque()

    @contextmanager
    def deferring(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def add(self, headers: torch.Tensor, check: Callable[[torch.Tensor], object]) -> None:
        arrived, copy = self.to_host(headers)
        self._pending.append((arrived, partial(check, copy)))

    def raise_failed(self, wait: bool = False) -> None:
        """Check the copies that have arrived or, with `wait`, all.

        Raises:
            PayloadError: the first check that failed; later ones are dropped.
        """
        while self._pending:
            arrived, check = self._pending[0]
            if wait or len(self._pending) > self.most:
                arrived.synchronize()
            elif not arrived.query():
                return
            self._pending.popleft()
            try:
                check()
            except PayloadError:
                self._pending.clear()
                raise

    @staticmethod
    def to_host(x: torch.Tensor) -> tuple[torch.cuda.Event, torch.Tensor]:
        """x on CUDA -> an event, and a tensor on the host that holds x after that event."""
        copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        copy.copy_(x, non_blocking=True)
        return torch.cuda.current_stream(x.device).record_event(), copy


def deferred_on(device: torch.device) -> DeferredChecks | None:
    """The checks that this thread defers for tensors on the device, or None."""
    checks = _current.get()
    return checks if checks and device.type in checks.devices else None


_current: ContextVar[DeferredChecks | None] = ContextVar("rhtcomm deferred checks", default=None)
