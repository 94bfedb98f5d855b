"""What tests that need a GPU share. `pytest -m cuda` runs them alone, as benchmarks/gpu.sh does."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

__all__ = ["needs_cuda"]

Test = TypeVar("Test", bound=Callable[..., Any])


def needs_cuda(test: Test) -> Test:
    """Skips the test where there is no GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    marked: Test = pytest.mark.cuda(skip(test))
    return marked
