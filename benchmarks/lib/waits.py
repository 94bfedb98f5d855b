"""Whether the host waits for the device."""

import contextlib
import warnings
from collections.abc import Iterator

import torch

__all__ = ["no_host_waits"]


@contextlib.contextmanager
def no_host_waits() -> Iterator[None]:
    """Within it, what makes the host wait for the device raises, as far as torch knows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not know everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
