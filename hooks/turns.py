"""A state's turn to send over a communicator that is not its own."""

import contextlib
import threading
import weakref
from collections.abc import Callable
from functools import partial

import torch

from ..communicators import Topology, users

__all__ = ["Turn"]


def _nothing() -> None:
    return None


class Turn:
    """Lasts from the first bucket of a backward pass to the end of the pass, which waits for them.

    All ranks see alike who has a turn within one backward pass and after it, and so raise alike.

    Args:
        topology: what is shared. Where it is private, everything here does nothing.
        name: of who takes the turn, for errors.
    """

    def __init__(self, topology: Topology, name: str) -> None:
        self._topology, self._name = topology, name
        self._finished = threading.Condition(users.lock)
        self._unfinished = 0  # buckets
        self._backward: weakref.ref[object] | None = None  # pass that buckets come from
        self.before_end: Callable[[], None] = _nothing
        """Called at the end of a pass, before it waits for buckets."""

    def __repr__(self) -> str:
        return self._name

    def take(self) -> None:
        """Before a bucket is handed over.

        Raises:
            RuntimeError: it is somebody else's turn.
        """
        if self._topology.private:
            return
        with users.lock:
            if self._backward is None:
                users.take(self._topology.carriers(), self)
                with contextlib.suppress(RuntimeError):  # there is no pass, as with DDP's join()
                    end = partial(self._end_backward)
                    torch.autograd.Variable._execution_engine.queue_callback(end)
                    # A pass that fails calls nothing, but it drops its callbacks.
                    self._backward = weakref.ref(end, self._drop_backward)
            self._unfinished += 1

    def finish_bucket(self) -> None:
        if self._topology.private:
            return
        with users.lock:
            self._unfinished -= 1
            self._give_back_when_done()

    def give_back(self) -> None:
        """At once, as after an error."""
        with users.lock:
            self._unfinished = 0
            self._finished.notify_all()
            users.give_back(self)

    def _end_backward(self) -> None:
        self.before_end()
        # DDP may leave it to the user to wait for buckets, any time after the pass. Whether they
        # are finished when another state takes its turn would then differ between ranks.
        with self._finished:
            self._finished.wait_for(lambda: self._unfinished == 0)
            self._backward = None
            self.give_back()

    def _drop_backward(self, of: weakref.ref[object]) -> None:
        with users.lock:
            if of is self._backward:
                self._backward = None
                self._give_back_when_done()

    def _give_back_when_done(self) -> None:
        if not self._unfinished:
            self._finished.notify_all()
            if self._backward is None:
                users.give_back(self)
