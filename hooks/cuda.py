"""What is asked of CUDA, or of an accelerator that torch treats alike."""

from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["Cuda", "Future"]

Future = torch.futures.Future[torch.Tensor]


class Cuda:
    """What engines ask of CUDA, or of an accelerator that torch treats alike.

    Tests put something in its place that records.
    """

    def queues(self, device: torch.device) -> bool:
        """Whether work on a device is queued on streams."""
        return device.type != "cpu"

    def new_stream(self, device: torch.device) -> Any:
        return torch.get_device_module(device).Stream(device)

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any]
        context = torch.get_device_module(stream.device).stream(stream)
        return context

    def ready(self, device: torch.device) -> Any:
        """An event behind what the current stream of a device has queued so far."""
        return self.current_stream(device).record_event()

    def current_stream(self, device: torch.device) -> Any:
        return torch.get_device_module(device).current_stream(device)

    def record_stream(self, x: torch.Tensor, stream: Any) -> None:
        """Keep the memory of x until what a stream has queued is done, should x go before."""
        x.record_stream(stream)

    def is_capturing(self, device: torch.device) -> bool:
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def future(self, device: torch.device) -> Future:
        return torch.futures.Future(devices=[device])

    def moment(self, device: torch.device) -> Any:
        """The moment at which the current stream of a device gets to where it is now."""
        moment = torch.get_device_module(device).Event(enable_timing=True)
        moment.record(self.current_stream(device))
        return moment

    def is_over(self, moment: Any, wait: bool) -> bool:
        """Whether the device has got there; with `wait`, it has when this returns."""
        if wait:
            moment.synchronize()
        return bool(moment.query())

    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments that are over."""
        return float(start.elapsed_time(end)) / 1000
