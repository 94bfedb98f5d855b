"""States of the hook, and buckets that reach them without DDP."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from harness import limit

from rhtcomm.hooks import Handle, RHTState

BLOCK = 256
# Compresses every bucket, finely enough to compare gradients.
FINE: dict[str, Any] = {"bits": 8, "block": BLOCK, "min_numel": 0}
# Of the mean of FINE, as `problems.nmse` has it: its error is 4.4e-5, while the mean of other ranks
# would be off by about 1.
TOLERANCE = 1e-3

TIMEOUT = timedelta(seconds=limit(50))  # in case of a failure, before the 60 s of the test
# For what ends long before it unless somebody is left waiting.
SOON = timedelta(seconds=limit(30))

# What the hook says of a rank that is gone, and what Gloo says of one that is silent or gone.
GAVE_UP = "another rank died, or failed and closed its connections"
LOST_PEER = "Timed out|Connection (closed|reset) by peer|Broken pipe"


class Bucket:
    """What the hook asks of dist.GradBucket, which Python cannot make."""

    def __init__(self, buffer: torch.Tensor, index: int = 0, last: bool = True) -> None:
        self._buffer, self._index, self._last = buffer, index, last

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._last

    def parameters(self) -> list[torch.Tensor]:
        return [self._buffer]


def submit(state: RHTState, buffer: torch.Tensor, index: int = 0, last: bool = True) -> Any:
    """The future of a bucket that is handed over directly."""
    return state.submit(Bucket(buffer, index, last))


@contextlib.contextmanager
def logged(level: int = logging.NOTSET) -> Iterator[list[str]]:
    """What the hook's log gets meanwhile, of this level and above; by default of root's."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("rhtcomm")
    log.setLevel(level)
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)


def _by_file(handle: Handle, folder: str) -> Callable[[Handle], None]:
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)

    def load(into: Handle) -> None:
        file.seek(0)
        into.load_state_dict(torch.load(file, weights_only=True))

    return load


def _by_dcp(handle: Handle, folder: str) -> Callable[[Handle], None]:
    """All ranks in one checkpoint."""
    dcp.save({"hook": handle}, checkpoint_id=folder)
    return lambda into: dcp.load({"hook": into}, checkpoint_id=folder)


SAVERS = {"torch.save": _by_file, "torch.distributed.checkpoint": _by_dcp}
"""Each saves a handle's state, and returns what loads it into another handle."""
