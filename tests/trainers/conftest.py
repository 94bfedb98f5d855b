"""Processes of their own for the trainers' packages, which change much in a process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Ranks


@pytest.fixture(scope="package")
def trainer_ranks() -> Iterator[Ranks]:
    """The processes in which trainers run their ranks."""
    with Ranks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a trainer writes."""
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, trainer_ranks: Ranks, folder: Path) -> list[Any]:
    """What the `cases` of a file return on each of two ranks."""
    return trainer_ranks.run(request.module.cases, 2, str(folder), timeout=120)
