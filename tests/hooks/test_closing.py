"""How states and processes end."""

import contextlib
import gc
import operator
import os
import re
import threading
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, limit, run_program
from models import backward, net, probe_backward, wrapped
from problems import nmse, numbers
from states import FINE, GAVE_UP, LOST_PEER, SOON, TIMEOUT, submit

from rhtcomm import TorchCommunicator
from rhtcomm.communicators.connecting import TRANSPORT
from rhtcomm.communicators.connection import Connection
from rhtcomm.communicators.sockets import SocketCommunicator
from rhtcomm.hooks import RHTState


def use_after_close(rank: int, world_size: int) -> None:
    gradient = numbers(rank, shape=(1000,))
    for uses in (0, 1):
        state = RHTState(**FINE, timeout=TIMEOUT)
        for _ in range(uses):
            assert probe_backward(state, gradient) is None
        steps = state.stats().steps
        # A state that nothing reached says so, once.
        with contextlib.nullcontext() if uses else pytest.warns(UserWarning, match="never called"):
            state.close()
        state.close()
        error = probe_backward(state, gradient)
        assert error is not None
        assert "RHTState was closed; make a new one" in error
        assert state.stats().steps == steps == uses
    assert probe_backward(RHTState(**FINE, timeout=TIMEOUT), gradient) is None


def test_use_after_close(ranks: Ranks) -> None:
    ranks.run(use_after_close, 2)


def close_at_once(rank: int, world_size: int) -> list[torch.Tensor]:
    """Close with buckets in flight, while the other rank has not even begun."""
    time.sleep(0.2 * rank)
    buffers = [numbers(rank, i, shape=(1000,)) for i in range(3)]
    state = RHTState(**FINE, timeout=TIMEOUT)
    futures = [submit(state, b, i, last=i == 2) for i, b in enumerate(buffers)]
    state.close()
    assert all(future.done() for future in futures)
    for future, buffer in zip(futures, buffers, strict=True):
        assert torch.equal(future.value(), buffer)
    return buffers


def test_close_finishes_what_is_in_flight(ranks: Ranks) -> None:
    for i, (first, second) in enumerate(zip(*ranks.run(close_at_once, 2), strict=True)):
        assert torch.equal(first, second)
        exact = (numbers(0, i, shape=(1000,)) + numbers(1, i, shape=(1000,))) / 2
        assert nmse(first, exact) < 1e-4


class LateReceiver:
    """A process group that is asked late for the messages of the others."""

    def __init__(self, group: Any, seconds: float) -> None:
        self.group, self.seconds = group, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def recv(self, *args: Any) -> Any:
        time.sleep(self.seconds)
        return self.group.recv(*args)


def receive_late(patch: pytest.MonkeyPatch, over: str, seconds: float) -> None:
    if over == "gloo":
        group: Any = TorchCommunicator.group
        late = property(lambda self: LateReceiver(group.fget(self), seconds))
        patch.setattr(TorchCommunicator, "group", late)
        return
    pull = Connection.pull

    def late_pull(self: Connection) -> None:
        time.sleep(seconds)
        pull(self)

    patch.setattr(Connection, "pull", late_pull)


def settle_late(patch: pytest.MonkeyPatch, over: str) -> None:
    kind: Any = TorchCommunicator if over == "gloo" else SocketCommunicator
    settle = kind.settle

    def late(communicator: Any, wait: bool = True) -> None:
        time.sleep(1 if wait else 0)
        settle(communicator, wait)

    patch.setattr(kind, "settle", late)


def leave_after_the_last_step(rank: int, world_size: int, over: str, how: str) -> None:
    """Rank 0 goes as soon as it has its mean; rank 1 asks for its own only later."""
    # Ranks ask for long messages before they send, and for short ones after it.
    shape = (100_000 if how == "gone" else 2_000_000,)
    buffer = numbers(rank, shape=shape)
    shown = how != "left out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRANSPORT, over)
        state = RHTState(**FINE, timeout=TIMEOUT)
        if not shown:  # DDP leaves out the last buckets of steps, which the second one shows
            for index in (0, 1):
                submit(state, buffer.clone(), index, last=False).wait()
        submit(state, buffer.clone(), last=False).wait()
        receive_late(patch, over, 0.5 * rank)
        if how == "gone":
            settle_late(patch, over)
        submit(state, buffer, index=1, last=shown).wait()
        if how == "gone":  # without close(), before the worker has settled
            del state
            gc.collect()
        else:
            state.engine.close()  # as Python's exit does
    mean = sum(numbers(r, shape=shape) for r in range(world_size)) / world_size
    assert (buffer - mean).norm() < 0.01 * mean.norm()


@pytest.mark.parametrize("how", ["last", "left out", "gone"])
@pytest.mark.parametrize("over", ["gloo", "sockets"])
def test_a_rank_that_leaves_after_its_last_step_fails_nobody(
    over: str, how: str, ranks: Ranks
) -> None:
    ranks.run(leave_after_the_last_step, 2, over, how)


def close_in_the_middle_of_a_step(rank: int, world_size: int, min_numel: int) -> str | None:
    """As where the backward pass of a rank raises between two buckets."""
    state = RHTState(**FINE | {"min_numel": min_numel}, timeout=TIMEOUT)
    big, small = numbers(rank, shape=(3000,)), numbers(rank, shape=(1000,))
    submit(state, big, last=False).wait()
    dist.barrier()
    if rank == 1:
        state.close()
        return None
    with pytest.raises(RuntimeError) as caught:
        submit(state, small, index=1).wait()
    state.close()
    return str(caught.value)


@pytest.mark.parametrize("min_numel", [0, 2000])
def test_a_rank_that_closes_within_a_step_wakes_the_others(min_numel: int, ranks: Ranks) -> None:
    """The next bucket being compressed or not."""
    first, _, third = ranks.run(close_in_the_middle_of_a_step, 3, min_numel, timeout=30)
    for message in (first, third):
        assert GAVE_UP in message


# ---- States that are forgotten ----------------------------------------------------------------


def leave_states_open(rank: int, world_size: int) -> tuple[list[int], list[int]]:
    """File descriptors, threads of Python and groups, after one and after six forgotten models."""

    def one() -> "weakref.ref[RHTState]":
        state = RHTState(**FINE)
        backward(wrapped(net(), state), rank)
        return weakref.ref(state)

    def counts() -> list[int]:
        gc.collect()
        groups = dist.distributed_c10d._world.pg_map
        return [len(os.listdir("/proc/self/fd")), threading.active_count(), len(groups)]

    def settled(most: list[int]) -> list[int]:
        """Connections end a moment after the worker has settled the last step."""
        deadline = time.monotonic() + limit(20)
        while any(map(operator.gt, counts(), most)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return counts()

    before = counts()
    forgotten = [one() for _ in range(6)]
    after = settled([before[0] + 2, *before[1:]])
    assert not any(state() for state in forgotten)
    dist.barrier()
    return before, after


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are counted in /proc")
def test_a_state_goes_with_its_model(ranks: Ranks) -> None:
    for before, after in ranks.run(leave_states_open, 2):
        assert after[0] <= before[0] + 2  # six states would leave 6 and more
        assert all(map(operator.le, after[1:], before[1:]))


def forget_a_state(rank: int, world_size: int) -> int:
    """How often the garbage collector waited for a thread."""
    state = RHTState(**FINE, timeout=SOON)
    submit(state, numbers(rank, shape=(1000,))).wait()
    worker: Any = state.engine.worker
    worker.submit(int).result()  # it has let go of the bucket, and with it of the state
    joined: list[threading.Thread] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "join", lambda thread, *_: joined.append(thread))
        gone = weakref.ref(state)
        del state
        gc.collect()
    assert not gone()
    return len(joined)


def test_the_garbage_collector_waits_for_no_thread(ranks: Ranks) -> None:
    """It may run in a thread that is starting, whose locks the end of another one needs."""
    assert ranks.run(forget_a_state, 2) == [0, 0]


# ---- Processes --------------------------------------------------------------------------------

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from rhtcomm.hooks import RHTState, rht_hook
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(64, 64), bucket_cap_mb=0.001)
state = RHTState(block=256, min_numel=0)
model.register_comm_hook(state, rht_hook)
torch.manual_seed(rank)
for step in range(3):
    if step == 2 and {fails}:
        sys.exit("this rank fails")
    model(torch.randn(8, 64)).square().mean().backward()
{ending}
print("done")
"""
DESTROY, CLOSE = "dist.destroy_process_group()", "state.close()"


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        f"{CLOSE}; {DESTROY}",
        f"{DESTROY}; {CLOSE}",
        f"import gc; del model, state; gc.collect(); {DESTROY}",
    ],
)
def test_programs_end_cleanly(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHTCOMM_KERNELS", "reference")  # which says nothing about missing kernels
    for rank in run_program(PROGRAM.format(fails=False, ending=ending), world_size=2):
        assert (rank.returncode, printed(rank.stdout), rank.stderr) == (0, "done\n", "")


def printed(text: str) -> str:
    """Without what Gloo of torch 2.9 prints, the number of its connections."""
    return re.sub(r"\[Gloo\] Rank \d+ is connected to .*\n", "", text)


def test_a_state_that_was_closed_too_late_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHTCOMM_KERNELS", "reference")
    for rank in run_program(PROGRAM.format(fails=False, ending=DESTROY), world_size=2):
        assert (rank.returncode, printed(rank.stdout)) == (0, "done\n")
        assert "ResourceWarning: an RHTState was still open when torch.distr" in rank.stderr


def test_programs_end_when_one_rank_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHTCOMM_KERNELS", "reference")
    other, failed = run_program(PROGRAM.format(fails="rank == 1", ending=DESTROY), world_size=2)
    assert (failed.returncode, failed.stderr) == (1, "this rank fails\n")
    assert other.returncode == 1
    assert re.search(LOST_PEER, other.stderr)
