"""Processes of their own for the trainers' packages, which change much in a process."""

from collections.abc import Iterator

import pytest
from harness import Ranks


@pytest.fixture(scope="package")
def trainer_ranks() -> Iterator[Ranks]:
    """The processes in which trainers run their ranks."""
    with Ranks() as ranks:
        yield ranks
