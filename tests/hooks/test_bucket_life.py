"""Buckets that do not outlive their step, and steps that do not end with the backward pass.

torch 2.15 frees DDP's buckets after each step with `lazy_bucket_allocation`, and leaves it to the
user to wait for them with `require_manual_backward_finalization`. Where torch has neither, that is
emulated.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import OfTheUser
from harness import Ranks, limit
from models import LAZY, gradients_of, in_backward, wrapped
from problems import numbers
from states import BLOCK, TIMEOUT, Bucket
from streams import in_place_of_cuda
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from rhtcomm.hooks import RHTState, rht_hook

MANUAL = hasattr(DistributedDataParallel, "finalize_backward")
STEPS = 4
FEEDBACK: dict[str, Any] = {
    "quantizer": "eden",
    "rotations": "auto",
    "error_feedback": True,
    "block": BLOCK,
    "min_numel": 0,
    "warmup_steps": 0,
}

EXACT: dict[str, Any] = {"min_numel": 10**6}

Future = torch.futures.Future[torch.Tensor]


class Images(nn.Module):
    """Gradients in two layouts, of several buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3))
        self.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.output = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.convolutions(x).tanh().mean(dim=(2, 3))
        output: torch.Tensor = self.output(features)
        return output


class Copied:
    """A bucket in memory of its own."""

    def __init__(self, bucket: dist.GradBucket) -> None:  # type: ignore[name-defined]
        self._buffer = bucket.buffer().clone()
        self.index, self.is_last, self.parameters = bucket.index, bucket.is_last, bucket.parameters

    def buffer(self) -> torch.Tensor:
        return self._buffer


class Lives:
    """Looks on as buckets come and go: DDP's own, or copies whose memory is freed after a step."""

    def __init__(self, copies: bool) -> None:
        self._copies = copies
        self._storages: list[torch.UntypedStorage] = []  # of copies in this step
        self._steps: list[list[StorageWeakRef]] = [[]]

    def hook(self, state: RHTState, bucket: dist.GradBucket) -> Future:  # type: ignore[name-defined]
        handed: Any = Copied(bucket) if self._copies else bucket
        storage = handed.buffer().untyped_storage()
        self._steps[-1].append(StorageWeakRef(storage))
        if self._copies:
            self._storages.append(storage)
        return rht_hook(state, handed)

    def end_step(self) -> None:
        """Whoever would read or write a copy from now on crashes."""
        for storage in self._storages:
            storage.resize_(0)
        self._storages.clear()
        self._steps.append([])

    def kept(self) -> int:
        """Buckets that something refers to; a worker lets go of the last one a moment late."""
        steps = self._steps[:-1]
        if self._copies:
            steps.pop()  # DDP keeps the futures of the last step
        buckets = [bucket for step in steps for bucket in step]
        assert len(steps[0]) == 1
        assert len(buckets) > len(steps)
        deadline = time.monotonic() + limit(10)
        while (kept := sum(not one.expired() for one in buckets)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return kept


def train(
    rank: int, world_size: int, kind: str, life: str, views: bool, exact: bool = False
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The gradients of all steps, and what error feedback has kept at the end."""
    torch.manual_seed(0)
    lives = Lives(copies=life == "emulated")
    options: dict[str, Any] = {"bucket_cap_mb": 0.005, "gradient_as_bucket_view": views}
    if life == "lazy":
        options |= LAZY
    with in_place_of_cuda(kind == "stream") as streams:
        streams.host_may_wait = True
        if kind == "cpu":
            streams.queues = lambda device: False  # type: ignore[method-assign]
        state = RHTState(2, **(EXACT if exact else FEEDBACK), timeout=TIMEOUT)
        ddp = wrapped(Images(), state, lives.hook, **options)
        gradients = []
        for step in range(STEPS):
            ddp.zero_grad()
            ddp(numbers(rank, step, shape=(2, 4, 8, 8))).square().mean().backward()
            gradients.append(gradients_of(ddp))
            lives.end_step()
        residuals = state.state_dict(ddp).get("residuals", {})
        ddp.zero_grad()
        assert life == "kept" or lives.kept() == 0
        state.close()
    return gradients, residuals


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "thread", "stream"])
def test_buckets_may_go_after_their_step(kind: str, views: bool, ranks: Ranks) -> None:
    expected = ranks.run(train, 2, kind, "kept", views)
    lives = ["emulated", "lazy"] if LAZY else ["emulated"]
    for life in lives:
        for found, same in zip(ranks.run(train, 2, kind, life, views), expected, strict=True):
            assert all(map(torch.equal, found[0], same[0])), life
            assert found[1].keys() == same[1].keys()
            assert all(torch.equal(found[1][name], same[1][name]) for name in same[1]), life
    (gradients, first), (others, second) = expected
    assert all(map(torch.equal, gradients, others))
    assert not torch.equal(first["output.weight"], second["output.weight"])


def test_uncompressed_buckets_may_go_after_their_step(ranks: Ranks) -> None:
    expected = ranks.run(train, 2, "cpu", "kept", False, True)
    for life in ["emulated", "lazy"] if LAZY else ["emulated"]:
        for found, same in zip(
            ranks.run(train, 2, "cpu", life, False, True), expected, strict=True
        ):
            assert all(map(torch.equal, found[0], same[0])), life


class Slow(OfTheUser):
    """Rank 0 finishes its buckets late."""

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        if self.rank == 0:
            time.sleep(0.05)
        return super().start_all_gather(x)


@contextlib.contextmanager
def two_states(kind: str) -> Iterator[list[RHTState]]:
    """Over connections of their own, over one communicator, or on the streams of one group."""
    with in_place_of_cuda() if kind == "stream" else contextlib.nullcontext() as streams:
        if streams is not None:
            streams.host_may_wait = True
        options: dict[str, Any] = {"timeout": TIMEOUT}
        if kind == "shared":
            options = {"communicator": Slow(dist.new_group(timeout=TIMEOUT))}
        states = [RHTState(2, **FEEDBACK, **options) for _ in range(2)]
        yield states
        for state in states:
            state.close()


KINDS = pytest.mark.parametrize("kind", ["own", "shared", "stream"])


def train_two(rank: int, world_size: int, kind: str, manual: bool) -> list[torch.Tensor]:
    """The gradients of both models, whose buckets nobody waits for until both passes are over."""
    gradients = []
    with two_states(kind) as states:
        torch.manual_seed(0)
        models = [wrapped(Images(), state, bucket_cap_mb=0.005) for state in states]
        if manual:
            for model in models:
                model.require_manual_backward_finalization = True
        for step in range(STEPS):
            for i, model in enumerate(models):
                model.zero_grad()
                model(numbers(rank, step, i, shape=(2, 4, 8, 8))).square().mean().backward()
            if manual:
                for model in models:
                    model.finalize_backward()
            gradients += [gradients_of(model) for model in models]
    return gradients


@pytest.mark.skipif(not MANUAL, reason="torch always waits for the buckets of a backward pass")
@KINDS
def test_buckets_may_be_waited_for_after_the_pass(kind: str, ranks: Ranks) -> None:
    expected = ranks.run(train_two, 2, kind, False)
    for found, same in zip(ranks.run(train_two, 2, kind, True), expected, strict=True):
        assert all(map(torch.equal, found, same))


class Handed(Bucket):
    """A bucket of one parameter."""

    def __init__(self, parameter: torch.Tensor, gradient: torch.Tensor, index: int) -> None:
        super().__init__(gradient, index, last=index == 1)
        self._parameter = parameter

    def parameters(self) -> list[torch.Tensor]:
        return [self._parameter]


def hand_over(rank: int, world_size: int, kind: str, after: bool) -> list[torch.Tensor]:
    """The means; the second of two buckets comes within the backward pass or after it."""
    means = []
    with two_states(kind) as states:
        parameters = [[torch.zeros(1000) for _ in range(2)] for _ in states]
        for step in range(STEPS):
            for i, (state, pair) in enumerate(zip(states, parameters, strict=True)):
                gradients = [numbers(rank, step, i, j, shape=(1000,)) for j in range(2)]
                buckets: list[Any] = list(map(Handed, pair, gradients, range(2)))
                futures: list[Any] = []
                within = buckets[:1] if after else buckets
                in_backward(lambda: futures.extend(map(state.submit, within)))  # noqa: B023
                futures += map(state.submit, buckets[len(within) :])
                for future in futures:
                    mean = future.wait()
                    means.append(mean.clone())
                    mean.untyped_storage().resize_(0)
    return means


@KINDS
def test_a_bucket_may_come_after_the_pass(kind: str, ranks: Ranks) -> None:
    expected = ranks.run(hand_over, 2, kind, False)
    for found, same in zip(ranks.run(hand_over, 2, kind, True), expected, strict=True):
        assert all(map(torch.equal, found, same))
    assert all(map(torch.equal, *expected))
