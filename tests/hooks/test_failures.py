"""A rank fails and lives on, or dies: the others hear of it, and end."""

import contextlib
import re
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import OfTheUser, two_levels
from harness import Ranks, limit, run_program
from models import backward, net, probe_backward, wrapped
from problems import numbers
from simulation import chunks_of, data, same_bits
from states import BLOCK, FINE, GAVE_UP, LOST_PEER, SOON, TIMEOUT, submit
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import Report, TorchCommunicator
from rhtcomm.codec import Coder
from rhtcomm.communicators.connecting import TRANSPORT
from rhtcomm.communicators.sockets import SocketCommunicator
from rhtcomm.hooks import RHTState

# ---- While a bucket is worked on --------------------------------------------------------------


def fail_on_rank_1(rank: int, world_size: int) -> dict[str, Any]:
    """The second of three buckets fails on one rank."""
    encode, calls = Coder.encode, 0

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            raise ZeroDivisionError("made by the test")
        return encode(*args, **kwargs)

    state = RHTState(**FINE, timeout=timedelta(seconds=5))
    gradients = [numbers(rank, i, shape=(1000,)) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coder, "encode", failing)
        # Parameters of 4000 bytes, a bucket each; unused ones make DDP use the buckets at once.
        options = {"bucket_cap_mb": 0.003, "find_unused_parameters": True}
        error = probe_backward(state, *gradients, **options)
    calls_made = calls
    with pytest.raises(Exception, match="earlier bucket failed") as later:
        submit(state, gradients[0]).wait()
    again = probe_backward(state, gradients[0])
    state.close()
    with pytest.raises(RuntimeError, match="closed"):
        submit(state, gradients[0])
    # The default group is as usable as before.
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    return {
        **{"error": error, "later": str(later.value), "again": again},
        **{"calls": calls_made, "total": total.item()},
    }


def test_an_error_on_one_rank_ends_all_of_them(ranks: Ranks) -> None:
    results = ranks.run(fail_on_rank_1, 3)
    for rank, result in enumerate(results):
        assert result["error"] is not None
        # Others may lose the bucket before too, of which not all had left the rank that gave up.
        fewest = 2 if rank == 1 else 1
        assert fewest <= result["calls"] <= 2, "buckets after the failure were worked on"
        assert result["total"] == 3
        assert "earlier bucket failed" in result["again"]
        if rank == 1:
            assert "ZeroDivisionError" in result["error"]
            assert "made by the test" in result["error"]
            assert "made by the test" in result["later"], "the first error is not named"
        else:
            # The first rank to give up closes its connections, which the next one may see earlier.
            for text in (result["error"], result["later"]):
                assert re.search(LOST_PEER, text)


def started(state: RHTState) -> Callable[[], bool]:
    """Whether the connections that a state made for itself are closed."""
    ddp = DistributedDataParallel(nn.Linear(1, 1))
    topology = state.start(ddp, ddp.process_group, torch.device("cpu")).topology
    if isinstance(topology, TorchCommunicator):
        group = weakref.ref(topology.group)
        return lambda: group() is None
    assert isinstance(topology, SocketCommunicator)
    connections = [*topology._connections]
    return lambda: all(connection.fileno() < 0 for connection in connections)


def take_steps(state: RHTState, buffer: torch.Tensor) -> None:
    for _ in range(4):
        submit(state, buffer).wait()


def fail_on_one_rank(
    rank: int, world_size: int, over: str, algorithm: str, error: type[BaseException]
) -> list[str]:
    """Rank 1 fails at each of its calls of the codec in turn, and all ranks live on."""
    encode, messages = Coder.encode, []
    for call in range(1, 5):
        remaining = call

        def failing(*args: Any, **options: Any) -> torch.Tensor:
            nonlocal remaining
            remaining -= 1
            if rank == 1 and not remaining:
                raise error("made by the test")
            return encode(*args, **options)

        with pytest.MonkeyPatch.context() as patch, chunks_of(3):
            patch.setattr(Coder, "encode", failing)
            state = RHTState(**FINE, algorithm=algorithm, timeout=TIMEOUT)
            patch.setenv(TRANSPORT, over)
            closed = started(state)
            with pytest.raises(RuntimeError) as caught:
                take_steps(state, numbers(rank, shape=(40 * BLOCK,)))
            state.close()
        messages.append(str(caught.value))
        # Even where the exception lives, nothing may keep the connections to the others open.
        assert closed()
        dist.barrier()
    return messages


@pytest.mark.parametrize(
    ("over", "algorithm", "error"),
    [
        *product(("sockets", "gloo"), ("all_gather", "two_shot", "gather"), (ZeroDivisionError,)),
        ("sockets", "all_gather", SystemExit),  # which futures do not take
    ],
)
def test_a_rank_that_fails_wakes_the_others(
    over: str, algorithm: str, error: type[BaseException], ranks: Ranks
) -> None:
    of_ranks = ranks.run(fail_on_one_rank, 3, over, algorithm, error)
    for own in of_ranks[1]:
        assert "made by the test" in own
    for others in (of_ranks[0], of_ranks[2]):
        for message in others:
            assert GAVE_UP in message


def settle_on_a_rank_that_is_gone(rank: int, world_size: int) -> str | None:
    """What fails behind a result fails the next bucket; on Gloo, which acknowledges there."""
    state = RHTState(**FINE, timeout=TIMEOUT)
    x = numbers(rank, shape=(1000,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRANSPORT, "gloo")
        submit(state, x.clone(), last=False).wait()
    dist.barrier()  # both have it
    if rank == 0:
        assert isinstance(state.engine.topology, TorchCommunicator)
        state.engine.topology.abort()
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state.engine.reducer, "mean_", lambda *_, **__: Report.of_nothing())
        submit(state, x, index=1).wait()
        with pytest.raises(RuntimeError) as caught:
            submit(state, x).wait()
    state.close()
    return str(caught.value)


def test_a_failure_behind_a_result_fails_the_next_bucket(ranks: Ranks) -> None:
    _, message = ranks.run(settle_on_a_rank_that_is_gone, 2)
    assert "an earlier bucket failed: rht_hook: rank 1 of 2 could not exchange bucket 1" in message
    assert GAVE_UP in message


def train_on_two_levels(rank: int, world_size: int) -> list[torch.Tensor | str]:
    """Buckets 0 to 2; the payload that rank 1 receives in bucket 1 is damaged."""
    communicator, step = two_levels(rank, 2, 2), 0
    start = SocketCommunicator.start_all_gather

    def damaged(self: Any, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        finish, between_nodes = start(self, x), bytes(x[:2].tolist()) == b"RH"

        def finish_damaged() -> torch.Tensor:
            gathered = finish()
            if between_nodes and (rank, step) == (1, 1):
                gathered[1, 9] ^= 1
            return gathered

        return finish_damaged

    outcomes: list[torch.Tensor | str] = []
    with (
        pytest.MonkeyPatch.context() as patch,
        RHTState(block=BLOCK, min_numel=0, communicator=communicator) as state,
    ):
        patch.setattr(SocketCommunicator, "start_all_gather", damaged)
        for step in range(3):
            x = data(rank, 10 * BLOCK + step)
            try:
                outcomes.append(submit(state, x).wait())
            except RuntimeError as error:
                outcomes.append(str(error))
    return outcomes


def test_other_nodes_hear_of_a_failed_share(ranks: Ranks) -> None:
    """They could decode, but the node of the failure will not go on."""
    outcomes = ranks.run(train_on_two_levels, 4)
    causes = [
        # What rank 1 gives back to its node may be lost as it leaves.
        f"rank 1 of this node could not decode its share.*see the error on that rank|{GAVE_UP}",
        "the payload of rank 1 was made with a configuration",
        *[GAVE_UP] * 2,
    ]
    for rank, (first, second, third) in enumerate(outcomes):
        assert same_bits(first, outcomes[0][0])
        # The other node has the mean already, and hears of it in the next step.
        assert re.search(causes[rank], third if rank > 1 else second)
        assert rank > 1 or "an earlier bucket failed" in third


# ---- Before it --------------------------------------------------------------------------------


def contradict_ddp_on_rank_1(rank: int, world_size: int) -> tuple[str, float]:
    options = {"process_group": dist.new_group([1, 2])} if rank == 1 else {}
    dist.new_group([1, 2]) if rank == 2 else None
    state = RHTState(**FINE, **options, timeout=SOON)
    begin = time.monotonic()
    with pytest.raises((RuntimeError, ValueError)) as caught:
        backward(wrapped(net(), state), rank)
    return str(caught.value), time.monotonic() - begin


def test_a_group_that_one_rank_mistakes_wakes_the_others(ranks: Ranks) -> None:
    (first, waited), (second, _), (third, _) = ranks.run(contradict_ddp_on_rank_1, 3)
    assert "averages over [0, 1, 2]; leave out process_group" in second
    for message in (first, third):
        assert GAVE_UP in message
    assert waited < SOON.total_seconds() / 2, "it was the timeout that woke them"


def fail_before_the_worker(rank: int, world_size: int, how: str, begun: bool) -> tuple[str, float]:
    """On rank 1; what all ranks are told, and how long that took."""
    states = {
        "closed, user's": lambda: RHTState(
            **FINE, communicator=OfTheUser(dist.new_group(timeout=SOON))
        )
    }
    state = states.get(how, lambda: RHTState(**FINE, timeout=SOON))()
    dist.barrier()  # torch itself lets a rank go on while others still connect
    x = numbers(rank, shape=(1000,))
    if begun:
        submit(state, x.clone()).wait()
        dist.barrier()
    buffer = x
    if rank == 1:
        if how == "sparse":
            buffer = x.to_sparse()
        elif how == "integers":
            buffer = x.long()
        else:
            unused = pytest.warns(UserWarning, match="never called")
            with contextlib.nullcontext() if begun else unused:
                state.close()
    begin = time.monotonic()
    with pytest.raises((RuntimeError, TypeError)) as caught:
        submit(state, buffer).wait()
    seconds = time.monotonic() - begin
    message = str(caught.value)
    del caught
    return message, seconds


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("how", ["sparse", "integers", "closed", "closed, user's"])
def test_a_bucket_that_is_refused_on_one_rank_wakes_the_others(
    how: str, begun: bool, ranks: Ranks
) -> None:
    (first, waited), (second, _), (third, _) = ranks.run(fail_before_the_worker, 3, how, begun)
    assert "sparse" in second or "floating-point" in second or "closed" in second
    for message in (first, third):
        assert GAVE_UP in message
    assert waited < SOON.total_seconds() / 2, "it was the timeout that woke them"


def fail_to_connect(rank: int, world_size: int) -> int:
    """As where the system has no more file descriptors: to wait for the others is of no use."""
    calls = []

    def broken(*_: Any) -> Any:
        calls.append(1)
        raise OSError("too many open files")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchCommunicator, "of_its_own", broken)
        state = RHTState(**FINE)
        with pytest.raises(OSError, match="too many open files"):
            submit(state, torch.zeros(1000))
        with pytest.raises(RuntimeError, match="it failed before: too many"):
            submit(state, torch.zeros(1000))
    return len(calls)


def test_a_rank_that_cannot_connect_does_not_try_twice(ranks: Ranks) -> None:
    assert ranks.run(fail_to_connect, 1) == [1]


# ---- Processes --------------------------------------------------------------------------------

CPU_GLOO = """
import torch, torch.distributed as dist
import rhtcomm.hooks as hooks
from rhtcomm.reduce import Reducer
from datetime import timedelta
from functools import partial
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group({backend!r}, timeout=timedelta(seconds={seconds}))
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(64, 64))
state = hooks.RHTState(min_numel=0, block=256)
model.register_comm_hook(state, hooks.rht_hook)
model(torch.randn(8, 64)).square().mean().backward()

def broken(*_, **__):
    raise MemoryError("no memory left on this rank")

if rank == 1:
    Reducer.mean_ = broken
try:
    model(torch.randn(8, 64)).square().mean().backward()
except RuntimeError as error:
    print(error)
dist.barrier()  # rank 1 lives on until rank 0 has heard of it
"""


@pytest.mark.parametrize("backend", ["cpu:gloo", None])
def test_a_failing_rank_wakes_the_others_however_gloo_was_named(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RHTCOMM_KERNELS", "reference")
    first, second = run_program(CPU_GLOO.format(backend=backend, seconds=limit(40)), world_size=2)
    assert GAVE_UP in first.stdout, (first, second)
    assert "no memory left on this rank" in second.stdout


DEATH = """
import os, time, torch, torch.distributed as dist
from datetime import timedelta
from rhtcomm.hooks import RHTState, rht_hook

dist.init_process_group("gloo", timeout=timedelta(seconds={seconds}))
rank = dist.get_rank()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
model.register_comm_hook(RHTState(min_numel=0, timeout=timedelta(seconds={seconds})), rht_hook)
loss = model(torch.randn(8, 64)).square().mean()
if rank == {dying}:
    time.sleep(1)
    os._exit(9)
try:
    loss.backward()
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_dies_before_its_first_bucket_ends_the_others(dying: int) -> None:
    """Not by the timeout: then they would say that it did not answer."""
    ended = run_program(DEATH.format(seconds=limit(40), dying=dying), world_size=3)
    for rank, process in enumerate(ended):
        if rank != dying:
            assert GAVE_UP in process.stdout, process
            assert not dying or re.search(r"rank 1(:| closed by it)", process.stdout), process
