"""How engines fail: on which thread errors come out, who hears of them, and what they keep.

CPU tensors stand in for CUDA tensors, and `Streams` for CUDA's streams.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from models import backward, net, wrapped
from problems import numbers
from states import FINE, TIMEOUT, submit
from streams import Enqueuing, in_place_of_cuda

from rhtcomm.hooks import RHTState

BOTH = pytest.mark.parametrize("enqueues", [True, False], ids=["stream", "thread"])


def capture_a_graph(rank: int, world_size: int, enqueues: bool) -> list[str]:
    """What backward() raises, and what comes of a bucket after the capture."""
    group = dist.new_group()
    with in_place_of_cuda(enqueues) as streams, pytest.MonkeyPatch.context() as patch:
        state = RHTState(**FINE, timeout=TIMEOUT)
        ddp = wrapped(net(), state, process_group=group)
        if enqueues:
            patch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
        streams.capturing = True
        with pytest.raises(RuntimeError) as captured:
            backward(ddp, rank, 0)
        streams.capturing = False
        with pytest.raises(RuntimeError) as refused:
            submit(state, numbers(rank, 1, shape=(1000,))).wait()
        assert "start all_gather" not in {what for what, _ in streams.asked()}
    dist.all_reduce(torch.zeros(1), group=group)  # DDP's, which may use NCCL too, is left alone
    return [str(captured.value), str(refused.value)]


@BOTH
def test_a_cuda_graph_is_refused_by_name(enqueues: bool, ranks: Ranks) -> None:
    for first, later in ranks.run(capture_a_graph, 2, enqueues):
        assert first.startswith("rht_hook: a CUDA graph is being captured")
        assert "an earlier bucket failed: rht_hook: a CUDA graph is being captured" in later


class Breaking(Enqueuing):
    """Its exchanges break from the second step on."""

    exchanges = 0
    enqueuing = True

    def enqueues(self, device: str) -> bool:
        return self.enqueuing

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.exchanges += 1
        if self.exchanges > 2:  # the ranks compare their configurations in the first
            raise RuntimeError("Connection closed by peer")
        return super().start_all_gather(x)


class CannotAbort(Breaking):
    def abort(self) -> None:
        raise ValueError("there is nobody to tell")


class Nameless(Breaking):
    def name_of(self, rank: int) -> str:
        if self.exchanges > 2:
            raise KeyError("no name")
        return super().name_of(rank)


def break_an_exchange(rank: int, world_size: int, kind: type[Breaking], enqueues: bool) -> Any:
    """The error of the bucket, what it came from, and that of the next one."""
    with in_place_of_cuda() as streams:
        streams.host_may_wait = True
        communicator = kind()
        communicator.enqueuing = enqueues
        state = RHTState(**FINE, communicator=communicator)
        submit(state, numbers(rank, 0, shape=(1000,))).wait()
        errors: list[Any] = []
        for step in (1, 2):
            try:
                done = submit(state, numbers(rank, step, shape=(1000,)))
                errors.append("by the future")
                done.wait()
            except Exception as error:
                errors += [str(error), str(error.__cause__)]
        return errors


def test_an_error_of_an_exchange_comes_out_on_the_calling_thread(ranks: Ranks) -> None:
    for error, cause, later, _ in ranks.run(break_an_exchange, 2, Breaking, True):
        assert "could not exchange bucket 0 of step 1: another rank died" in error
        assert cause == "Connection closed by peer"
        assert "an earlier bucket failed: rht_hook: rank" in later


@BOTH
@pytest.mark.parametrize("kind", [CannotAbort, Nameless])
def test_a_bucket_ends_whatever_else_fails(
    kind: type[Breaking], enqueues: bool, ranks: Ranks
) -> None:
    for errors in ranks.run(break_an_exchange, 2, kind, enqueues, timeout=30):
        if not enqueues:
            assert errors.pop(0) == "by the future"
        error, _, *_, later, _ = errors
        assert "Connection closed by peer" in error
        assert "an earlier bucket failed" in later


def fail_while_measuring(rank: int, world_size: int, enqueues: bool) -> str:
    def broken(*_: Any) -> Any:
        raise RuntimeError("there is no kernel")

    with in_place_of_cuda(enqueues), pytest.MonkeyPatch.context() as patch:
        patch.setattr("rhtcomm.reduce.reducer.between_nodes", broken)
        state = RHTState(**FINE, nmse_every=1, timeout=TIMEOUT)
        with pytest.raises(RuntimeError) as caught:
            submit(state, numbers(rank, 0, shape=(1000,))).wait()
        return str(caught.value)


@BOTH
def test_only_errors_of_the_transport_are_explained_so(enqueues: bool, ranks: Ranks) -> None:
    for message in ranks.run(fail_while_measuring, 2, enqueues):
        assert "there is no kernel" in message
        assert "could not exchange" not in message


def forget_a_failed_state(rank: int, world_size: int, how: str) -> bool:
    """Whether the garbage collector took it."""
    with in_place_of_cuda(how != "closed") as streams:
        streams.host_may_wait = True
        state = RHTState(**FINE, timeout=TIMEOUT)
        submit(state, numbers(rank, 0, shape=(1000,))).wait()
        streams.capturing = how == "capture"
        buffer = numbers(rank, 1, shape=(1000,))
        if how == "closed":
            state.close()
        with pytest.raises((RuntimeError, TypeError)):
            submit(state, buffer.long() if how == "integers" else buffer).wait()
        gone = weakref.ref(state)
        del state
        gc.collect()
        return gone() is None


@pytest.mark.parametrize("how", ["closed", "integers", "capture"])
def test_a_state_that_failed_goes_with_its_model(how: str, ranks: Ranks) -> None:
    assert ranks.run(forget_a_failed_state, 2, how) == [True, True]
