"""Delivers the reports of buckets to observers, and measures how long training waited for each."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from .buckets import Bucket
from .cuda import Cuda, Future
from .stats import BucketReport, Totals

__all__ = ["Observer", "Reports", "reports_to", "wait_for"]

_log = logging.getLogger("rhtcomm")

Observer = Callable[[BucketReport], object]

Moments = tuple[Any, Any, Cuda]
"""On a device: events before and after training waits for a bucket."""
Wait = float | Moments | None
"""Seconds; None if unknown."""


@dataclass(slots=True)
class _Followed:
    """A bucket whose mean training has not waited for yet."""

    step: int
    reports: list[BucketReport]
    future: Future | None
    device: torch.device
    cuda: Cuda
    wait: Wait = None

    def land(self) -> None:
        """Wait for the mean as training would, and measure the wait.

        Errors are not raised here: training gets them from the future. On a device the current
        stream waits, and the host does not.
        """
        future = self.future
        assert future is not None
        if self.cuda.queues(self.device):
            start = self.cuda.moment(self.device)
            wait_for(future)
            self.wait = start, self.cuda.moment(self.device), self.cuda
        elif future.done():
            self.wait = 0.0
        else:
            since = time.perf_counter()
            wait_for(future)
            self.wait = time.perf_counter() - since


def wait_for(future: Future) -> None:
    with suppress(Exception):
        future.wait()


class Reports:
    """The reports of one state. It holds no reference to the state, which must stay collectable.

    Observers are called on the training thread, after training has waited for the means of a step.
    On a device the host runs ahead, so they are called when the device has caught up: a step later,
    or in `close`.

    Args:
        observers: an observer that raises is dropped with a warning.
        totals: the waits are added to these.
    """

    def __init__(self, observers: Sequence[Observer], totals: Totals) -> None:
        self._observers, self._totals = [*observers], totals
        self._followed: deque[_Followed] = deque()
        self._landed: deque[list[_Followed]] = deque()

    def follow(self, bucket: Bucket, future: Future, cuda: Cuda) -> None:
        """Follow a bucket that DDP passed to the hook, and will wait for after the backward pass.

        The callback queued with the step's last bucket runs right before DDP's own. A turn
        (`hooks/turns.py`) ends by waiting for its buckets, and calls `land` before that. Without an
        autograd node, DDP calls the hook from its own callback (static_graph, first step), and
        waits there.
        """
        if self._followed and self._followed[-1].step != bucket.key.step:
            self._give_up_finished()
        self.add(bucket, future, cuda)
        if bucket.ends and torch._C._current_autograd_node() is not None:
            torch.autograd.Variable._execution_engine.queue_callback(self.land)

    def add(
        self, bucket: Bucket, future: Future | None, cuda: Cuda, wait: float | None = None
    ) -> None:
        """Follow a bucket; without a future, training has its mean already."""
        assert bucket.reports is not None
        key, device = bucket.key, bucket.buffer.device
        self._followed.append(_Followed(key.step, bucket.reports, future, device, cuda, wait))

    def land(self, count: int | None = None) -> None:
        """Wait for the first `count` buckets, or all, on behalf of training.

        There are fewer if `close` was called in the meantime.
        """
        landed, there = [], len(self._followed)
        for _ in range(there if count is None else min(count, there)):
            followed = self._followed.popleft()
            if followed.future is not None:
                followed.land()
                followed.future = None
            landed.append(followed)
        self._landed.append(landed)
        self._deliver()

    def _give_up_finished(self) -> None:
        """Deliver finished buckets whose wait was not seen: DDP left out the step's last ones."""
        landed = []
        while self._followed and (future := self._followed[0].future) and future.done():
            landed.append(self._followed.popleft())
        self._landed.append(landed)
        self._deliver()

    def _deliver(self, wait: bool = False) -> None:
        """Deliver what was waited for; on a device only what is over, or all of it with `wait`."""
        while self._landed:
            landed = self._landed[0]
            for followed in landed:
                if isinstance(followed.wait, tuple):
                    start, end, cuda = followed.wait
                    if not cuda.is_over(end, wait):
                        return
                    followed.wait = cuda.seconds(start, end)
            self._observe(self._landed.popleft())

    def _observe(self, landed: list[_Followed]) -> None:
        """Call the observers. Buckets that failed have no reports."""
        before = None
        for followed in landed:
            wait: Any = followed.wait
            if wait is not None and followed.reports:
                self._totals.add_wait(wait)
            for report in followed.reports:
                if wait is not None:  # of the parts of a bucket, it was for the last one
                    report.exposed_seconds = wait if report is followed.reports[-1] else 0.0
                if before is not None:
                    before.last = before.step != report.step
                    self._call(before)
                before = report
        if before is not None:
            before.last = True
            self._call(before)

    def _call(self, report: BucketReport) -> None:
        for observer in self._observers:
            try:
                observer(report)
            except Exception as error:
                self._drop(observer, error)

    def _drop(self, observer: Observer, error: Exception) -> None:
        """Stop calling an observer: its error must not end this rank, and so the others."""
        self._observers = [other for other in self._observers if other is not observer]
        with suppress(Exception):  # of a handler of the log
            _log.warning(
                "rhtcomm: the observer %s raised an error, and is not called any more; training "
                "goes on",
                getattr(observer, "__qualname__", repr(observer)),
                exc_info=error,
            )

    def close(self) -> None:
        """Deliver what is left, close the observers that have a `close`, and forget all of them."""
        for followed in self._followed:  # whose waiting was not seen
            followed.future = None
        self._landed.append([*self._followed])
        self._followed.clear()
        self._deliver(wait=True)
        for observer in self._observers:
            try:
                getattr(observer, "close", _nothing)()
            except Exception as error:
                self._drop(observer, error)
        self._observers = []


def _nothing() -> None:
    return None


def reports_to(observer: Any, totals: Totals, owner: str) -> Reports | None:
    """The reports of a state; None without observers.

    Args:
        observer: as the user passed it: one observer, several, or None.
        owner: named in errors.

    Raises:
        TypeError: an observer is not a function.
    """
    if observer is None:
        return None
    several = isinstance(observer, (list, tuple)) and not callable(observer)
    observers = list(observer) if several else [observer]
    for one in observers:
        if not callable(one) or isinstance(one, type):
            raise TypeError(
                f"{owner}: observer={one!r:.80} must be a function of a report, such as "
                'rhtcomm.hooks.telemetry.csv("run.csv"), or a list of such functions'
            )
    return Reports(observers, totals) if observers else None
