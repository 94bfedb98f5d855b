"""Fixtures that several test modules share."""

import multiprocessing as mp
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from harness import Ranks, limit
from interpreter import Interpreted, interpret

# Threads that wait for each other spin, which on a busy machine takes ten times as long.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The processes in which distributed tests run their ranks."""
    with Ranks() as ranks:
        yield ranks


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreted]:
    """Calls a function of tests/lib/interpreter.py where the Triton kernels run."""
    spawn = mp.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=interpret) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=limit(120))
