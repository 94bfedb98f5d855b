"""What several test modules share."""

from collections.abc import Iterator

import pytest
import torch
from harness import Ranks

# Threads that wait for each other spin, which on a busy machine takes ten times as long.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The processes in which distributed tests run their ranks."""
    with Ranks() as ranks:
        yield ranks
