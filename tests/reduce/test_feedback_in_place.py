"""Residuals that an exchange updates in place: memory, failures, and numbers that may overflow."""

from typing import Any

import pytest
import torch
from harness import Ranks
from problems import numbers
from simulation import BLOCK, chunks_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rhtcomm
from rhtcomm import Codec, Key, PayloadError, QuicFL
from rhtcomm.communicators import Communicator
from rhtcomm.kernels import Residual
from rhtcomm.reduce import Algorithm, Reducer
from rhtcomm.reduce.residual import Update
from rhtcomm.segments import Segments

CODEC = Codec(QuicFL(4), block=BLOCK)
CHUNKS = 12
NUMEL = CHUNKS * 3 * BLOCK


class Allocations(TorchDispatchMode):
    """The largest new memory that an operation of this thread returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def count_memory(rank: int, world_size: int, algorithm: Algorithm) -> list[float]:
    """The largest allocation in units of the tensor: of finite numbers, and with one that is not.

    With segments, of which one is unused.
    """
    reducer, found = Reducer(CODEC, rhtcomm.TorchCommunicator(), algorithm, min_numel=0), []
    residual = [torch.zeros(1000), torch.zeros(NUMEL - 1000)]
    with chunks_of(3):
        for step in range(4):
            x = numbers(rank, step, shape=(NUMEL,))
            x[:1000] *= step == 0
            if step == 3:
                x[5] = torch.inf
            with Allocations() as allocations:
                reducer.mean_(x, Key(1, step), lengths=(1000, NUMEL - 1000), residual=residual)
            found.append(allocations.largest / (4 * NUMEL))
    return found


@pytest.mark.parametrize("algorithm", ["all_gather", "two_shot"])
def test_no_memory_of_the_size_of_the_tensor(algorithm: Algorithm, ranks: Ranks) -> None:
    for first, *others, spoilt in ranks.run(count_memory, 2, algorithm):
        assert max(first, *others) < 0.4, "a temporary is too large"
        assert spoilt >= 1, "the old residual was not kept"


class Damaging(rhtcomm.TorchCommunicator):
    """Damages another rank's payload in one of the messages that it gathers."""

    number, count = -1, 0

    def start_all_gather(self, x: torch.Tensor) -> Any:
        finish, number = super().start_all_gather(x), self.count
        self.count += 1

        def damaged() -> torch.Tensor:
            gathered = finish()
            if number == self.number:
                gathered[1 - self.rank, 5] ^= 1
            return gathered

        return damaged


def fail(rank: int, world_size: int, algorithm: Algorithm, number: int) -> list[torch.Tensor]:
    """The residual before and after, and what it would have become."""
    communicator: Communicator = rhtcomm.TorchCommunicator()
    before = numbers(rank, 9, shape=(NUMEL,)) / 3
    options: dict[str, Any] = {"algorithm": algorithm, "min_numel": 0, "check": False}
    with chunks_of(3):
        whole = before.clone()
        x = numbers(rank, shape=(NUMEL,))
        rhtcomm.all_reduce(x, CODEC, Key(1), communicator, residual=whole, **options)
        damaging, after = Damaging(), before.clone()
        damaging.number = number
        x = numbers(rank, shape=(NUMEL,))
        with pytest.raises(PayloadError):
            rhtcomm.all_reduce(x, CODEC, Key(1), damaging, residual=after, **options)
    return [before, after, whole]


@pytest.mark.parametrize(("algorithm", "length"), [("all_gather", 3), ("two_shot", 6)])
@pytest.mark.parametrize("number", [0, 3])
def test_a_failure_leaves_each_chunk_as_it_was_or_as_it_becomes(
    algorithm: Algorithm, length: int, number: int, ranks: Ranks
) -> None:
    done = number * length * BLOCK
    for before, after, whole in ranks.run(fail, 2, algorithm, number):
        assert torch.equal(after[:done], whole[:done])
        assert torch.equal(after[done:], before[done:])
        assert not torch.equal(before[done:], whole[done:])


def overflow(rank: int, world_size: int, dtype: torch.dtype, last: float) -> list[torch.Tensor]:
    """Finite numbers whose mean is not, in the last chunk."""
    residual = numbers(rank, 9, shape=(NUMEL,)) / 3
    before = residual.clone()
    x = numbers(rank, shape=(NUMEL,)).to(dtype)
    x[-BLOCK:] = last * torch.where(numbers(3, shape=(BLOCK,)) > 0, 1, -1)
    assert x.isfinite().all()
    with chunks_of(3):
        communicator = rhtcomm.TorchCommunicator()
        rhtcomm.all_reduce(
            *(x, CODEC, Key(1), communicator),
            algorithm="all_gather",
            min_numel=0,
            residual=residual,
        )
    return [x, before, residual]


@pytest.mark.parametrize(
    ("dtype", "last"),
    [(torch.float16, 65504.0), (torch.bfloat16, 3.38e38), (torch.float32, 3.4e38)],
)
def test_a_mean_that_overflows_keeps_the_residual(
    dtype: torch.dtype, last: float, ranks: Ranks
) -> None:
    for mean, before, after in ranks.run(overflow, 2, dtype, last):
        assert not mean.isfinite().all()
        assert mean[: -3 * BLOCK].isfinite().all()
        assert torch.equal(before, after)


def test_a_residual_is_read_before_an_exchange_only_if_its_bound_is_large_or_unknown() -> None:
    x, used, segments = torch.ones(100), torch.zeros(4, dtype=torch.uint8), Segments(None, 100)
    large = torch.full((100,), torch.inf)
    for bound, announced in [(None, 255), (torch.inf, 255), (torch.nan, 255), (3.0, 0)]:
        given = None if bound is None else torch.tensor([bound])
        update = Update(Residual.of([large], given), segments)
        assert update.announce(x, used)[-4:].tolist() == 4 * [announced]
    x[7] = 2.0**40
    update = Update(Residual.of([x], torch.zeros(1)), segments)
    assert update.announce(x, used)[-4:].tolist() == 4 * [255], "the tensor is always read"


def test_what_torch_writes_raises_the_bound() -> None:
    residual = Residual.of([torch.zeros(3), torch.zeros(4)], torch.tensor([2.0]))
    for value, bound in [(1.0, 2.0), (-5.0, 5.0), (3.0, 5.0), (torch.nan, torch.nan)]:
        residual.at(1).write(torch.tensor([0.0, 0.0, value]))
        assert residual.bound is not None
        assert torch.equal(residual.bound.nan_to_num(7), torch.tensor([bound]).nan_to_num(7))
