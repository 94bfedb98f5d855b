"""On which thread and stream buckets are exchanged, and where their errors come out.

CPU tensors over Gloo stand in for CUDA tensors over NCCL, and `Streams` for CUDA's streams. What
needs a GPU is skipped without one.
"""

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, limit
from streams import AUTOGRADS, SIDE, Enqueuing, in_place_of_cuda
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import Codec, HierarchicalCommunicator, QuicFL, TorchCommunicator
from rhtcomm.hooks import RHTState, rht_hook
from rhtcomm.hooks.connect import connect
from rhtcomm.hooks.engines import StreamEngine, ThreadEngine, engine_for
from rhtcomm.reduce import Reducer
from rhtcomm.wire import PayloadError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
TIMEOUT = timedelta(seconds=limit(50))
FINE: dict[str, Any] = {"bits": 8, "block": 256, "min_numel": 0}
# At 8 bits the error of the mean is 4.4e-5; that of anything else would be about 1.
TOLERANCE = 1e-3


def numbers(rank: int, step: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * rank + step))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


def registered(model: nn.Module, state: RHTState, **options: Any) -> DistributedDataParallel:
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01, **options)  # type: ignore[arg-type]
    ddp.register_comm_hook(state, rht_hook)
    return ddp


def backward(ddp: nn.Module, rank: int, step: int) -> list[torch.Tensor]:
    """The gradients."""
    ddp.zero_grad()
    ddp(numbers(rank, step, 8, 64)).square().mean().backward()
    return [parameter.grad.clone() for parameter in ddp.parameters()]  # type: ignore[union-attr]


def submit(state: RHTState, buffer: torch.Tensor, index: int = 0, last: bool = True) -> Any:
    bucket = SimpleNamespace(
        buffer=lambda: buffer,
        index=lambda: index,
        is_last=lambda: last,
        parameters=lambda: [buffer],
    )
    return state.submit(bucket)


@contextlib.contextmanager
def no_look_at_numbers() -> Iterator[None]:
    """Within it, whatever would make the host wait for CUDA raises."""

    def refuse(x: torch.Tensor, *_: object) -> Any:
        raise AssertionError("the host waited for a number")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


# ---- The order of things ----------------------------------------------------------------------


def train_on_streams(rank: int, world_size: int) -> tuple[list[torch.Tensor], list[Any]]:
    """Gradients of all steps; and of each step, what was asked."""
    groups, threads = len(dist.distributed_c10d._world.pg_map), {*threading.enumerate()}
    with in_place_of_cuda() as streams:
        state = RHTState(**FINE)
        ddp = registered(net(), state)
        gradients, asked = [], []
        for step in range(4):
            with no_look_at_numbers() if step else contextlib.nullcontext():
                gradients += backward(ddp, rank, step)
            assert {thread for *_, thread in streams.log} == {threading.get_ident()}
            asked.append(streams.asked())
        assert isinstance(state.engine, StreamEngine)
        assert state.engine.topology.carriers() == [ddp.process_group]
        assert not state.engine.topology.private
        streams.host_may_wait = True
        state.close()
    dist.all_reduce(torch.zeros(1), group=ddp.process_group)  # closing has left it alone
    assert len(dist.distributed_c10d._world.pg_map) == groups
    assert {*threading.enumerate()} == threads
    return gradients, asked


def train_on_a_thread(rank: int, world_size: int) -> list[torch.Tensor]:
    with RHTState(**FINE, timeout=TIMEOUT) as state:
        ddp = registered(net(), state)
        gradients = [g for step in range(4) for g in backward(ddp, rank, step)]
        assert isinstance(state.engine, ThreadEngine)
    return gradients


def of_a_bucket(event: int) -> list[tuple[str, str]]:
    return [
        (f"record event {event}", AUTOGRADS),  # behind the gradients
        (f"wait for event {event}", AUTOGRADS),
        ("record_stream", AUTOGRADS),
        ("start all_gather", SIDE),
        ("finish all_gather", SIDE),
        ("copy headers", SIDE),
        ("complete", SIDE),  # so that DDP waits for the side stream
    ]


def test_a_stream_engine_queues_everything_in_order_and_waits_for_nothing(ranks: Ranks) -> None:
    expected = ranks.run(train_on_a_thread, 2)[0]
    for gradients, (first, *rest) in ranks.run(train_on_streams, 2):
        for gradient, same in zip(gradients, expected, strict=True):
            assert torch.equal(gradient, same)
        compared = [("start all_gather", SIDE), ("finish all_gather", SIDE)]
        event, wait, *more = of_a_bucket(1)
        assert first == [event, ("new stream", AUTOGRADS), wait, more[0], *compared, *more[1:]]
        events = 1
        for asked in rest:  # in buckets that DDP made anew after the first step
            assert len(asked) > 2 * len(of_a_bucket(1))
            for i in range(0, len(asked), len(of_a_bucket(1))):
                events += 1
                assert asked[i : i + len(of_a_bucket(1))] == of_a_bucket(events)


def train_on_a_device_over_gloo(rank: int, world_size: int) -> list[torch.Tensor]:
    with in_place_of_cuda(enqueues=False) as streams:
        with RHTState(**FINE, timeout=TIMEOUT) as state:
            streams.host_may_wait = True
            ddp = registered(net(), state)
            gradients = [g for step in range(4) for g in backward(ddp, rank, step)]
            assert isinstance(state.engine, ThreadEngine)
            worker: Any = state.engine.worker.submit(threading.get_ident).result()
        caller, calls = threading.get_ident(), [what for what, *_ in streams.log]
        for what, stream, thread in streams.log:
            assert thread == (caller if what.startswith("record event") else worker), what
            assert stream == (SIDE if what in ("copy headers", "complete") else AUTOGRADS), what
        events = [call.split()[-1] for call in calls if call.startswith("record event")]
        assert len(events) > 4
        for event in events:  # which a bucket's memory and result go along with
            i = calls.index(f"wait for event {event}")
            assert i > calls.index(f"record event {event}")
            of_worker = [call for call in calls[i:] if not call.startswith("record event")]
            assert of_worker[1:4] == ["record_stream", "copy headers", "complete"]
    return gradients


def test_over_gloo_a_worker_exchanges_what_lies_on_a_device(ranks: Ranks) -> None:
    expected = ranks.run(train_on_a_thread, 2)[0]
    for gradients in ranks.run(train_on_a_device_over_gloo, 2):
        for gradient, same in zip(gradients, expected, strict=True):
            assert torch.equal(gradient, same)


# ---- Which engine -----------------------------------------------------------------------------


def choose(rank: int, world_size: int) -> dict[str, str]:
    """By the backends that a group has, the engine for CPU and CUDA tensors."""
    communicator = TorchCommunicator()
    reducer = Reducer(Codec(QuicFL(4)), communicator)
    chosen = {}
    for config in ("cpu:gloo,cuda:gloo", "cpu:gloo,cuda:nccl", "cuda:nccl-legacy", "cpu:xccl"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_backend_config", lambda group, config=config: config)
            chosen[config] = " ".join(
                engine_for(torch.device(device), reducer).__name__ for device in ("cpu", "cuda")
            )
    return chosen


def test_the_transport_decides_by_which_engine_and_not_the_device(ranks: Ranks) -> None:
    assert ranks.run(choose, 1) == [
        {
            "cpu:gloo,cuda:gloo": "ThreadEngine ThreadEngine",
            "cpu:gloo,cuda:nccl": "ThreadEngine StreamEngine",
            "cuda:nccl-legacy": "ThreadEngine StreamEngine",
            "cpu:xccl": "StreamEngine ThreadEngine",
        }
    ]


def connect_for(rank: int, world_size: int) -> None:
    group, device = dist.new_group(), torch.device("cpu")
    shared = connect(device, group, None, TIMEOUT)
    assert shared.private
    shared.close()
    with in_place_of_cuda():
        shared = connect(device, group, None, TIMEOUT)
    assert isinstance(shared, TorchCommunicator)
    assert shared.group is group
    assert not shared.private
    given = Enqueuing(group)
    assert connect(device, None, given, None) is given


def test_what_enqueues_gets_no_second_connections(ranks: Ranks) -> None:
    ranks.run(connect_for, 2)


def mix_levels(rank: int, world_size: int) -> list[str]:
    messages = []
    for kinds in ((Enqueuing, TorchCommunicator), (TorchCommunicator, Enqueuing)):
        levels = [kind(dist.new_group()) for kind in kinds]
        state = RHTState(**FINE, communicator=HierarchicalCommunicator(*levels))
        with pytest.raises(ValueError, match="needs both levels of one kind") as caught:
            submit(state, numbers(rank, 0, 1000))
        messages.append(str(caught.value))
        state.close()
    return messages


def test_levels_that_only_one_engine_could_serve_are_refused(ranks: Ranks) -> None:
    """A worker thread must not call NCCL, and autograd's thread should not wait for Gloo."""
    for between, within in ranks.run(mix_levels, 1):
        assert "cpu tensors between nodes make the host wait" in between
        assert "cpu tensors within a node make the host wait" in within


# ---- Several states ---------------------------------------------------------------------------


def two_models_on_one_group(rank: int, world_size: int) -> list[float]:
    """In one backward pass, of one size: swapped messages would be taken for right."""
    errors = []
    with in_place_of_cuda() as streams:
        models, twins = [net(0), net(1)], [net(0), net(1)]
        states = [RHTState(**FINE) for _ in models]
        first, second = (registered(m, s) for m, s in zip(models, states, strict=True))
        for step in range(3):
            x = numbers(rank, step, 8, 64)
            for model in (*models, *twins):
                model.zero_grad()
            second(first(x)).square().mean().backward()
            twins[1](twins[0](x)).square().mean().backward()
            for model, twin in zip(models, twins, strict=True):
                for found, own in zip(model.parameters(), twin.parameters(), strict=True):
                    exact = own.grad.double()  # type: ignore[union-attr]
                    dist.all_reduce(exact)
                    exact /= world_size
                    lost = (found.grad.double() - exact).square().sum()  # type: ignore[union-attr]
                    errors.append(float(lost / exact.square().sum()))
        streams.host_may_wait = True
        for state in states:
            state.close()
    return errors


def test_two_states_share_the_group_in_one_backward_pass(ranks: Ranks) -> None:
    for errors in ranks.run(two_models_on_one_group, 2):
        assert max(errors) < TOLERANCE


class Replaying(Enqueuing):
    """Hands out again what it gathered last, when told to."""

    replay = False
    last: torch.Tensor

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        finish = super().start_all_gather(x)

        def replayed() -> torch.Tensor:
            gathered = finish()
            self.last = self.last if self.replay else gathered
            return self.last

        return replayed


def mistake_a_payload(rank: int, world_size: int) -> str:
    """Both states are in the same place of their runs, and send as much."""
    with in_place_of_cuda() as streams:
        streams.host_may_wait = True
        communicator = Replaying()
        states = [RHTState(**FINE, communicator=communicator) for _ in range(2)]
        for state in states:
            submit(state, numbers(rank, 0, 1000))
        submit(states[0], numbers(rank, 1, 1000))
        communicator.replay = True
        submit(states[1], numbers(rank, 1, 1000))
        states[0].close()
        with pytest.raises(PayloadError) as caught:
            states[1].close()
    return str(caught.value)


def test_payloads_on_one_group_say_whose_they_are(ranks: Ranks) -> None:
    for message in ranks.run(mistake_a_payload, 2):
        assert "was made for another key" in message


def begin_in_another_order(rank: int, world_size: int) -> None:
    with in_place_of_cuda():
        communicator = Enqueuing()
        states = [RHTState(**FINE, communicator=communicator) for _ in range(2)]
        with pytest.raises(RuntimeError, match="states that were given its communicator before it"):
            submit(states[rank], numbers(rank, 0, 1000))


def test_states_that_begin_in_another_order_are_told_apart(ranks: Ranks) -> None:
    ranks.run(begin_in_another_order, 2)


# ---- Errors -----------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("enqueues", [True, False], ids=["stream", "thread"])


def capture_a_graph(rank: int, world_size: int, enqueues: bool) -> list[str]:
    """What backward() raises, and what comes of a bucket after the capture."""
    group = dist.new_group()
    with in_place_of_cuda(enqueues) as streams, pytest.MonkeyPatch.context() as patch:
        state = RHTState(**FINE, timeout=TIMEOUT)
        ddp = registered(net(), state, process_group=group)
        if enqueues:
            patch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
        streams.capturing = True
        with pytest.raises(RuntimeError) as captured:
            backward(ddp, rank, 0)
        streams.capturing = False
        with pytest.raises(RuntimeError) as refused:
            submit(state, numbers(rank, 1, 1000)).wait()
        assert "start all_gather" not in {what for what, _ in streams.asked()}
    dist.all_reduce(torch.zeros(1), group=group)  # DDP's, which may use NCCL too, is left alone
    return [str(captured.value), str(refused.value)]


@BOTH
def test_a_cuda_graph_is_refused_by_name(enqueues: bool, ranks: Ranks) -> None:
    for first, later in ranks.run(capture_a_graph, 2, enqueues):
        assert first.startswith("rht_hook: a CUDA graph is being captured")
        assert "an earlier bucket failed: rht_hook: a CUDA graph is being captured" in later


class Breaking(Enqueuing):
    """Breaks in the second step; what it does with a group that is its own, it cannot tell."""

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
        submit(state, numbers(rank, 0, 1000)).wait()
        errors: list[Any] = []
        for step in (1, 2):
            try:
                done = submit(state, numbers(rank, step, 1000))
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
            submit(state, numbers(rank, 0, 1000)).wait()
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
        submit(state, numbers(rank, 0, 1000)).wait()
        streams.capturing = how == "capture"
        buffer = numbers(rank, 1, 1000)
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
