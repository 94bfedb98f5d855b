"""What tests that need a GPU share. `pytest -m cuda` runs them alone, as benchmarks/gpu.sh does."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch

__all__ = ["needs_cuda", "no_host_waits"]

Test = TypeVar("Test", bound=Callable[..., Any])


def needs_cuda(test: Test) -> Test:
    """Skips the test where there is no GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    marked: Test = pytest.mark.cuda(skip(test))
    return marked


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
