"""Who may send over a communicator that several states share, and until when."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import OfTheUser
from harness import Ranks, limit
from models import error_of_mean, in_backward
from problems import numbers
from states import FINE, SOON, TOLERANCE, submit

from rhtcomm.communicators import users
from rhtcomm.hooks import RHTState
from rhtcomm.hooks.turns import Turn


class Shared:
    """What a turn asks of a topology."""

    private = False

    def carriers(self) -> list[object]:
        return [self]


def turns(count: int) -> list[Turn]:
    shared: Any = Shared()
    return [Turn(shared, f"state {i}") for i in range(count)]


def test_a_turn_is_kept_while_a_bucket_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker may finish the bucket before at any time."""
    first, second = turns(2)
    first.take()  # outside of any backward pass, as with DDP's join()
    take, worker = users.take, threading.Thread(target=first.finish_bucket)

    def take_slowly(*arguments: Any) -> None:
        take(*arguments)
        worker.start()
        worker.join(0.5)

    monkeypatch.setattr(users, "take", take_slowly)
    first.take()
    monkeypatch.undo()
    worker.join()
    with pytest.raises(RuntimeError, match="state 1 cannot use"):
        second.take()
    first.finish_bucket()
    second.take()
    second.finish_bucket()


def backward_ends(call: Callable[[], object]) -> None:
    """`in_backward`, which fails the test where it waits for ever."""
    thread = threading.Thread(target=in_backward, args=(call,), daemon=True)
    thread.start()
    thread.join(limit(20))
    assert not thread.is_alive()


def test_a_pass_ends_when_its_buckets_are_finished() -> None:
    """Else the ranks would not see alike whose turn it is after it."""
    first, second = turns(2)
    worker = threading.Timer(0.2, first.finish_bucket)

    def call() -> None:
        first.take()
        worker.start()

    backward_ends(call)
    second.take()
    worker.join()


def test_a_pass_ends_when_its_buckets_are_given_up() -> None:
    first, second = turns(2)
    worker = threading.Timer(0.2, first.give_back)

    def call() -> None:
        first.take()
        first.take()
        worker.start()

    backward_ends(call)
    second.take()
    worker.join()


def test_a_pass_that_fails_waits_for_nothing_and_keeps_no_turn() -> None:
    first, second = turns(2)

    def call() -> None:
        first.take()
        raise KeyError("within the pass")

    with pytest.raises(KeyError):
        in_backward(call)
    with pytest.raises(RuntimeError, match="state 1 cannot use"):
        second.take()  # the bucket is not finished
    first.finish_bucket()
    second.take()


class Slow(OfTheUser):
    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        if self.rank == 0:
            time.sleep(0.2)
        return super().start_all_gather(x)


def hand_over(state: RHTState, buffers: list[torch.Tensor], futures: list[Any], i: int) -> None:
    futures.append(submit(state, buffers[i], i, last=i == 1))


def leave_buckets_to_the_end(rank: int, world_size: int, after: bool) -> list[float]:
    """Two states take turns, two passes for each step. Nobody waits for a bucket before all are
    handed over; or the last one comes outside of a pass, where it is waited for, as DDP does."""
    communicator = Slow(dist.new_group(timeout=SOON))
    states = [RHTState(**FINE, communicator=communicator) for _ in range(2)]
    errors = []
    for step in range(0, 12, 4):
        futures: list[Any] = []
        means = [numbers(rank, step + i, shape=(1000,)) for i in range(4)]
        for state, buffers in zip(states, (means[:2], means[2:]), strict=True):
            call = partial(hand_over, state, buffers, futures)
            in_backward(partial(call, 0))
            if after:
                call(1)
                futures[-1].wait()
            else:
                in_backward(partial(call, 1))
        for future in futures:
            future.wait()
        for i, mean in enumerate(means):
            errors.append(error_of_mean(mean, numbers(rank, step + i, shape=(1000,))))
    for state in states:
        state.close()
    return errors


@pytest.mark.parametrize("after", [False, True])
def test_a_step_may_end_after_its_backward_pass(after: bool, ranks: Ranks) -> None:
    for errors in ranks.run(leave_buckets_to_the_end, 2, after):
        assert len(errors) == 12
        assert max(errors) < TOLERANCE
