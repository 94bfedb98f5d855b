"""Reports of buckets on their way to observers, and how long training waited for each."""

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
"""Of a device: before training waits for a bucket, and when it goes on."""
Wait = float | Moments | None
"""Seconds; None: nobody knows."""


@dataclass(slots=True)
class _Followed:
    """A bucket whose mean training has not waited for."""

    step: int
    reports: list[BucketReport]
    future: Future | None
    device: torch.device
    cuda: Cuda
    wait: Wait = None

    def land(self) -> None:
        """Wait for the mean as training does, and measure it. Errors are for those who train.

        On a device the moments are those of the current stream: it waits, and the host need not.
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
    """Those of one state. It refers to no state, which could not be collected then.

    Reports reach the observers on the thread that trains, when a step's means have been waited for.
    Of devices, whose host runs ahead, they come when the device has got there: a step later, or
    with `close`.

    Args:
        observers: an observer that raises is dropped with a warning.
        totals: where waits are added.
    """

    def __init__(self, observers: Sequence[Observer], totals: Totals) -> None:
        self._observers, self._totals = [*observers], totals
        self._followed: deque[_Followed] = deque()
        self._landed: deque[list[_Followed]] = deque()

    def follow(self, bucket: Bucket, future: Future, cuda: Cuda) -> None:
        """Of a bucket that DDP has handed over. DDP waits for it at the end of the backward pass.

        A callback that is queued with the step's last bucket comes right before DDP's own; a turn
        (`hooks/turns.py`), which ends by waiting for buckets, calls `land` before that. Without a
        node, DDP hands over in its own callback (static_graph, first step), and waits there.
        """
        if self._followed and self._followed[-1].step != bucket.key.step:
            self._give_up_finished()
        self.add(bucket, future, cuda)
        if bucket.ends and torch._C._current_autograd_node() is not None:
            torch.autograd.Variable._execution_engine.queue_callback(self.land)

    def add(
        self, bucket: Bucket, future: Future | None, cuda: Cuda, wait: float | None = None
    ) -> None:
        """Of a bucket that was handed over; without a future, training has its mean already."""
        assert bucket.reports is not None
        key, device = bucket.key, bucket.buffer.device
        self._followed.append(_Followed(key.step, bucket.reports, future, device, cuda, wait))

    def land(self, count: int | None = None) -> None:
        """Wait for the first `count` of the buckets, or all, in the place of training.

        There are fewer where `close` was called meanwhile.
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
        """Of buckets whose waiting was not seen: the last ones of a step that DDP left out."""
        landed = []
        while self._followed and (future := self._followed[0].future) and future.done():
            landed.append(self._followed.popleft())
        self._landed.append(landed)
        self._deliver()

    def _deliver(self, wait: bool = False) -> None:
        """What has been waited for; on a device only if that is over, or after it, with `wait`."""
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
        """Buckets that failed have no reports."""
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
        """An error here must end neither this rank nor, by its end, the others."""
        self._observers = [other for other in self._observers if other is not observer]
        with suppress(Exception):  # of a handler of the log
            _log.warning(
                "rhtcomm: the observer %s raised an error, and is not called any more; training "
                "goes on",
                getattr(observer, "__qualname__", repr(observer)),
                exc_info=error,
            )

    def close(self) -> None:
        """Deliver what is left, and close observers that have a `close`; they are forgotten."""
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
    """Those of a state whose user gave one observer, several, or None.

    Raises:
        TypeError: one is no function.
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
