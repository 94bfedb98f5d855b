"""What several test modules share."""

from collections.abc import Iterator

import pytest
from harness import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The processes in which distributed tests run their ranks."""
    with Ranks() as ranks:
        yield ranks
