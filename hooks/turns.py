"""A state's turn on a shared communicator."""

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
    """Lasts from the first bucket of a backward pass to the end of the pass, which waits for the
    buckets.

    All ranks see the same turns, within a backward pass and after it, so all raise or none.

    Args:
        topology: the shared communicator. If it is private, turns do nothing.
        name: of the user, for errors.
    """

    def __init__(self, topology: Topology, name: str) -> None:
        self._topology, self._name = topology, name
        self._finished = threading.Condition(users.lock)
        self._unfinished = 0  # buckets
        self._backward: weakref.ref[object] | None = None  # the pass of the buckets
        self.before_end: Callable[[], None] = _nothing
        """Called at the end of a pass, before it waits for buckets."""

    def __repr__(self) -> str:
        return self._name

    def take(self) -> None:
        """Call it before submitting a bucket.

        Raises:
            RuntimeError: it is another user's turn.
        """
        if self._topology.private:
            return
        with users.lock:
            if self._backward is None:
                users.take(self._topology.carriers(), self)
                with contextlib.suppress(RuntimeError):  # there is no pass, as with DDP's join()
                    end = partial(self._end_backward)
                    torch.autograd.Variable._execution_engine.queue_callback(end)
                    # A failing pass does not call its callbacks, but it drops them.
                    self._backward = weakref.ref(end, self._drop_backward)
            self._unfinished += 1

    def finish_bucket(self) -> None:
        if self._topology.private:
            return
        with users.lock:
            self._unfinished -= 1
            self._give_back_when_done()

    def give_back(self) -> None:
        """End the turn at once, as after an error."""
        with users.lock:
            self._unfinished = 0
            self._finished.notify_all()
            users.give_back(self)

    def _end_backward(self) -> None:
        self.before_end()
        # DDP may let the user wait for buckets, at any time after the pass. Whether they are
        # finished when another state takes its turn could then differ between ranks.
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
