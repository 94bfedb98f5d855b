"""What engines ask of CUDA, for CPU tensors: it happens at once, and is written down in order."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rhtcomm import TorchCommunicator
from rhtcomm.deferred import DeferredChecks
from rhtcomm.hooks import connect, engines

__all__ = ["AUTOGRADS", "SIDE", "Enqueuing", "Streams", "in_place_of_cuda", "no_look_at_numbers"]

AUTOGRADS, SIDE = "autograd's", "side"


class Event:
    """It has happened, but the host must not wait for it."""

    def __init__(self, streams: "Streams", number: int = 0) -> None:
        self.number, self._streams = number, streams

    def query(self) -> bool:
        return not self._streams.behind

    def synchronize(self) -> None:
        assert self._streams.host_may_wait


class Stream:
    def __init__(self, streams: "Streams") -> None:
        self._streams = streams

    def wait_event(self, event: Event) -> None:
        self._streams.note(f"wait for event {event.number}")


class Streams(engines.Cuda):
    """In the place of `Cuda`; also what devices look like that queue work on streams.

    `log` holds what was asked, the stream that was current then, and the thread.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str, int]] = []
        self.capturing = self.host_may_wait = False
        self.behind = False
        """Whether the device has not got to what was asked of it."""
        self._current = threading.local()  # of each thread
        self._events = 0

    def note(self, what: str) -> None:
        current = getattr(self._current, "stream", AUTOGRADS)
        self.log.append((what, current, threading.get_ident()))

    def asked(self) -> list[tuple[str, str]]:
        """What was asked so far, and on which stream; it begins anew."""
        asked = [(what, stream) for what, stream, _ in self.log]
        self.log.clear()
        return asked

    def queues(self, device: torch.device) -> bool:
        return True

    def new_stream(self, device: torch.device) -> Stream:
        self.note("new stream")
        return Stream(self)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.stream = SIDE
        try:
            yield
        finally:
            self._current.stream = AUTOGRADS

    def ready(self, device: torch.device) -> Event:
        self._events += 1
        self.note(f"record event {self._events}")
        return Event(self, self._events)

    def current_stream(self, device: torch.device) -> Stream:
        return Stream(self)

    def record_stream(self, x: torch.Tensor, stream: Stream) -> None:
        self.note("record_stream")

    def is_capturing(self, device: torch.device) -> bool:
        return self.capturing

    def future(self, device: torch.device) -> torch.futures.Future[torch.Tensor]:
        return _Future(self)

    def moment(self, device: torch.device) -> Event:
        self._events += 1
        self.note(f"record moment {self._events}")
        return Event(self, self._events)

    def is_over(self, moment: Event, wait: bool) -> bool:
        if wait:
            self.behind = False
        return moment.query()

    def seconds(self, start: Event, end: Event) -> float:
        return float(end.number - start.number)


class _Future(torch.futures.Future):  # type: ignore[type-arg]
    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._note = streams.note

    def set_result(self, result: Any) -> None:
        self._note("complete")
        super().set_result(result)


class Enqueuing(TorchCommunicator):
    """On Gloo, but it says that it queues what is exchanged; `streams` are told of it."""

    streams: Streams | None = None

    def enqueues(self, device: str) -> bool:
        return True

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.note("start all_gather")
        finish = super().start_all_gather(x)

        def finished() -> torch.Tensor:
            self.note("finish all_gather")
            return finish()

        return finished

    def start_all_to_all(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.note("start all_to_all")
        finish = super().start_all_to_all(x)

        def finished() -> torch.Tensor:
            self.note("finish all_to_all")
            return finish()

        return finished

    def all_reduce_(self, x: torch.Tensor, op: Any = "sum") -> None:
        self.note("all_reduce_")
        super().all_reduce_(x, op)

    def note(self, what: str) -> None:
        if self.streams is not None:
            self.streams.note(what)


@contextlib.contextmanager
def in_place_of_cuda(enqueues: bool = True) -> Iterator[Streams]:
    """Within it, states run on `Streams`, and DDP's groups count as what `enqueues` or does not."""
    streams = Streams()

    def to_host(x: torch.Tensor) -> tuple[Event, torch.Tensor]:
        streams.note("copy headers")
        return Event(streams), x.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "Cuda", lambda: streams)
        if enqueues:
            patch.setattr(connect, "TorchCommunicator", Enqueuing)
        patch.setattr(Enqueuing, "streams", streams)
        patch.setattr(DeferredChecks, "devices", ("cpu",))
        patch.setattr(DeferredChecks, "to_host", staticmethod(to_host))
        yield streams


@contextlib.contextmanager
def no_look_at_numbers() -> Iterator[None]:
    """Within it, whatever would make the host wait for CUDA raises."""

    def refuse(x: torch.Tensor, *_: object) -> Any:
        raise AssertionError("the host waited for a number")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
            patch.setattr(torch.Tensor, name, refuse)
        yield
