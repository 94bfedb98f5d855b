"""Several states over one group or one communicator."""

import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import OfTheUser
from harness import Ranks, limit
from models import backward, exact_mean, net, wrapped
from problems import nmse, numbers
from states import FINE, SOON, TOLERANCE, submit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from rhtcomm import HierarchicalCommunicator, TorchCommunicator
from rhtcomm.communicators.sockets import SocketCommunicator
from rhtcomm.communicators.users import Users
from rhtcomm.hooks import RHTState

# ---- By what ----------------------------------------------------------------------------------


def two_models_at_once(rank: int, world_size: int, how: str) -> list[float]:
    """Of one size, in one backward pass, so that swapped messages would be taken for right."""

    def layer(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(32, 32, bias=False)

    group = dist.new_group()
    mesh = init_device_mesh("cpu", (2, world_size // 2))
    communicators: dict[str, Callable[[], Any]] = {
        "groups": lambda: TorchCommunicator(group),
        "world": lambda: TorchCommunicator(),
        "mesh": lambda: HierarchicalCommunicator.from_mesh(mesh),
    }
    shared = TorchCommunicator(group)
    models, twins = [layer(0), layer(1)], [layer(0), layer(1)]
    # Without compression nothing in a message says whose it is.
    states = [
        RHTState(
            **FINE | {"min_numel": 0 if how != "world" else 1 << 20},
            communicator=shared if how == "object" else communicators[how](),
        )
        for _ in models
    ]
    first, second = (wrapped(m, s) for m, s in zip(models, states, strict=True))
    errors = []
    for step in range(10):
        x = numbers(rank, step, shape=(16, 32))
        for model in (*models, *twins):
            model.zero_grad()
        second(first(x)).square().mean().backward()
        twins[1](twins[0](x)).square().mean().backward()
        for model, twin in zip(models, twins, strict=True):
            exact = twin.weight.grad.double()
            dist.all_reduce(exact)
            errors.append(nmse(model.weight.grad.double(), exact / world_size))
    for state in states:
        state.close()
    return errors


@pytest.mark.parametrize("how", ["groups", "object", "world", "mesh"])
def test_two_models_in_one_backward_pass_over_one_group(how: str, ranks: Ranks) -> None:
    for errors in ranks.run(two_models_at_once, 4 if how == "mesh" else 2, how):
        assert max(errors) < TOLERANCE


def share_what_cannot_be_shared(rank: int, world_size: int) -> list[str]:
    communicator = OfTheUser(dist.new_group())
    states = [RHTState(**FINE, communicator=communicator) for _ in range(2)]
    torch.manual_seed(0)
    first, second = (wrapped(nn.Linear(32, 32), state) for state in states)
    x = numbers(rank, shape=(16, 32))
    first(x).square().mean().backward()
    second(x).square().mean().backward()  # by turns they may
    with pytest.raises(
        RuntimeError, match="give each a communicator over its own group"
    ) as at_once:
        second(first(x)).square().mean().backward()
    return [str(at_once.value)]


def test_a_communicator_serves_one_state_at_a_time(ranks: Ranks) -> None:
    for (message,) in ranks.run(share_what_cannot_be_shared, 2):
        assert "cannot use" in message


def take_turns_in_another_order(rank: int, world_size: int) -> str:
    """On rank 1 the second state begins: payloads of one size, key and place."""
    communicator = OfTheUser(dist.new_group(timeout=SOON))
    states = [RHTState(**FINE, communicator=communicator) for _ in range(2)]
    for state in states:
        submit(state, numbers(rank, shape=(1000,))).wait()
    for state in states if rank == 0 else reversed(states):
        with pytest.raises(RuntimeError) as caught:
            submit(state, numbers(rank, shape=(1000,))).wait()
        break
    return str(caught.value)


def test_payloads_say_whose_they_are(ranks: Ranks) -> None:
    messages = ranks.run(take_turns_in_another_order, 2)
    assert any("was made for another key" in message for message in messages)


def begin_in_another_order(rank: int, world_size: int, apart: bool, two_levels: bool) -> str:
    """The wrong states would meet for good, whether or not the communicator can be had apart."""
    kind = TorchCommunicator if apart else OfTheUser
    communicator: Any = kind(dist.new_group(timeout=SOON))
    if two_levels:
        communicator = HierarchicalCommunicator(dist.new_group([rank]), communicator)
    states = [RHTState(**FINE, communicator=communicator) for _ in range(2)]
    with pytest.raises(RuntimeError) as caught:
        submit(states[rank], numbers(rank, shape=(1000,))).wait()
    return str(caught.value)


@pytest.mark.parametrize("two_levels", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_states_that_begin_in_another_order_are_told_apart(
    apart: bool, two_levels: bool, ranks: Ranks
) -> None:
    for message in ranks.run(begin_in_another_order, 2, apart, two_levels):
        assert "given its communicator before it (0 on rank 0; 1 on rank 1)" in message


def share_a_communicator(rank: int, world_size: int) -> None:
    """Two models by turns, whose workers are late to settle on one rank or the other."""
    communicator, delays = TorchCommunicator(), random.Random(rank)
    settle = SocketCommunicator.settle

    def late(self: SocketCommunicator, wait: bool = True) -> None:
        time.sleep(delays.choice([0, 0.02]))
        settle(self, wait)

    x = numbers(rank, shape=(2000,))
    mean = torch.stack([numbers(r, shape=(2000,)) for r in range(world_size)]).mean(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SocketCommunicator, "settle", late)
        states = [RHTState(**FINE, communicator=communicator) for _ in range(2)]
        for _ in range(10):
            for state in states:
                buffer = x.clone()
                submit(state, buffer).wait()
                assert (buffer - mean).norm() < 0.01 * mean.norm()
            communicator.all_gather(torch.zeros(3, dtype=torch.uint8))
        for state in states:
            state.close()


def test_states_may_share_a_communicator_between_steps(ranks: Ranks) -> None:
    ranks.run(share_a_communicator, 3, timeout=40)


# ---- After a backward pass that fails ---------------------------------------------------------


class Faulty(torch.autograd.Function):
    """The identity, whose backward pass fails when it is told to."""

    fails = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if Faulty.fails:
            raise ValueError("the user's")
        return gradient


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([net(), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net[1](Faulty.apply(self.net[0](x)))
        return y


def fail_within_backward(rank: int, world_size: int) -> float:
    communicator = OfTheUser(dist.new_group(timeout=SOON))
    state = RHTState(**FINE, communicator=communicator)
    faulty = wrapped(Wrapped(), state, bucket_cap_mb=1e-4)
    for step in range(2):  # then the buckets are small ones
        backward(faulty, rank, step)
    Faulty.fails = True
    with pytest.raises(ValueError, match="the user's"):
        backward(faulty, rank)
    Faulty.fails = False
    model = net(1)
    with RHTState(**FINE, communicator=communicator) as another:
        return nmse(backward(wrapped(model, another), rank), exact_mean(model, [0, 1]))


def test_a_backward_pass_that_fails_keeps_no_communicator(ranks: Ranks) -> None:
    assert max(ranks.run(fail_within_backward, 2)) < TOLERANCE


# ---- Users of a communicator ------------------------------------------------------------------


def test_a_user_that_is_gone_leaves_nothing_behind() -> None:
    class User:
        pass

    communicator: Any = SimpleNamespace(private=False, carriers=lambda: [carrier])
    carrier, gone, next_one, last = (User() for _ in range(4))
    users = Users()
    users.take([carrier], gone)
    del gone
    with users.using(communicator, next_one):
        pass
    users.take([carrier], last)


def test_the_garbage_collector_may_give_back_while_another_takes() -> None:
    """It runs in whichever thread allocates, that one's locks held."""
    users, collected = Users(), object()

    class Carrier:
        def __hash__(self) -> int:
            users.give_back(collected)
            return 0

    thread = threading.Thread(target=users.take, args=([Carrier()], users), daemon=True)
    thread.start()
    thread.join(limit(10))
    assert not thread.is_alive()
