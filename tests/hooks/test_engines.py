"""On which thread and stream buckets are exchanged, and where their errors come out.

CPU tensors over Gloo stand in for CUDA tensors over NCCL, and `Streams` for CUDA's streams. What
needs a GPU is skipped without one.
"""

import contextlib
import copy
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cuda import needs_cuda
from harness import Ranks
from models import error_of_mean, gradients_of, mlp, wrapped
from problems import numbers
from states import FINE, TIMEOUT, TOLERANCE, submit
from streams import AUTOGRADS, SIDE, Enqueuing, in_place_of_cuda, no_look_at_numbers
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import Codec, HierarchicalCommunicator, QuicFL, TorchCommunicator
from rhtcomm.hooks import RHTState
from rhtcomm.hooks.connect import connect
from rhtcomm.hooks.engines import Cuda, StreamEngine, ThreadEngine, engine_for
from rhtcomm.reduce import Reducer
from rhtcomm.wire import PayloadError


def registered(state: RHTState, seed: int = 0, **options: Any) -> DistributedDataParallel:
    """A model of several buckets."""
    torch.manual_seed(seed)
    ddp: DistributedDataParallel
    ddp = wrapped(mlp(64, 64, 64, 64, 64), state, bucket_cap_mb=0.01, **options)
    return ddp


def backward(ddp: nn.Module, rank: int, step: int) -> list[torch.Tensor]:
    """The gradients."""
    ddp.zero_grad()
    ddp(numbers(rank, step, shape=(8, 64))).square().mean().backward()
    return [parameter.grad.clone() for parameter in ddp.parameters()]  # type: ignore[union-attr]


# ---- The order of things ----------------------------------------------------------------------


def train_on_streams(rank: int, world_size: int) -> tuple[list[torch.Tensor], list[Any]]:
    """Gradients of all steps; and of each step, what was asked."""
    groups, threads = len(dist.distributed_c10d._world.pg_map), {*threading.enumerate()}
    with in_place_of_cuda() as streams:
        state = RHTState(**FINE)
        ddp = registered(state)
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
        ddp = registered(state)
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


def resume_on_streams(rank: int, world_size: int) -> tuple[int, list[Any]]:
    """How many buckets a step has, and what is asked in one that has the first ones of new DDP."""
    with in_place_of_cuda() as streams:
        streams.host_may_wait = True
        state = RHTState(**FINE)
        ddp = registered(state, static_graph=True)  # which has them in two steps
        for step in range(3):
            backward(ddp, rank, step)
        saved = state.state_dict()
        gradients = [backward(ddp, rank, step) for step in (3, 4)]
        state.close()
        state = RHTState(**FINE)
        ddp = registered(state, static_graph=True)
        state.load_state_dict(saved)
        resumed = [backward(ddp, rank, 3)]
        streams.host_may_wait = False
        streams.asked()
        with no_look_at_numbers():
            resumed.append(backward(ddp, rank, 4))
        asked = streams.asked()
        streams.host_may_wait = True
        state.close()
    for found, expected in zip(resumed, gradients, strict=True):
        assert all(map(torch.equal, found, expected))
    return len(saved["buckets"]), asked


def test_a_bucket_that_is_taken_apart_waits_for_nothing(ranks: Ranks) -> None:
    for buckets, asked in ranks.run(resume_on_streams, 2):
        *begin, _, _, _, complete = of_a_bucket(int(asked[0][0].split()[-1]))
        exchange = of_a_bucket(1)[3:6]
        assert buckets > 2
        assert asked == [*begin, *exchange * buckets, complete]


def train_on_a_device_over_gloo(rank: int, world_size: int) -> list[torch.Tensor]:
    with in_place_of_cuda(enqueues=False) as streams:
        with RHTState(**FINE, timeout=TIMEOUT) as state:
            streams.host_may_wait = True
            ddp = registered(state)
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
            submit(state, numbers(rank, 0, shape=(1000,)))
        messages.append(str(caught.value))
        state.close()
    return messages


def test_levels_that_only_one_engine_could_serve_are_refused(ranks: Ranks) -> None:
    """A worker thread must not call NCCL, and autograd's thread should not wait for Gloo."""
    for between, within in ranks.run(mix_levels, 1):
        assert "cpu tensors between nodes block the host" in between
        assert "cpu tensors within a node block the host" in within


# ---- Several states ---------------------------------------------------------------------------


def two_models_on_one_group(rank: int, world_size: int) -> list[float]:
    """In one backward pass, of one size: swapped messages would be taken for right."""
    errors = []
    with in_place_of_cuda() as streams:
        states = [RHTState(**FINE) for _ in range(2)]
        models = [registered(state, seed) for seed, state in enumerate(states)]
        twins = [copy.deepcopy(model.module) for model in models]
        for step in range(3):
            x = numbers(rank, step, shape=(8, 64))
            for model in (*models, *twins):
                model.zero_grad()
            models[1](models[0](x)).square().mean().backward()
            twins[1](twins[0](x)).square().mean().backward()
            for model, twin in zip(models, twins, strict=True):
                errors.append(error_of_mean(gradients_of(model), gradients_of(twin)))
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
            submit(state, numbers(rank, 0, shape=(1000,)))
        submit(states[0], numbers(rank, 1, shape=(1000,)))
        communicator.replay = True
        submit(states[1], numbers(rank, 1, shape=(1000,)))
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
            submit(states[rank], numbers(rank, 0, shape=(1000,)))


def test_states_that_begin_in_another_order_are_told_apart(ranks: Ranks) -> None:
    ranks.run(begin_in_another_order, 2)


# ---- Real streams -----------------------------------------------------------------------------


def test_an_accelerator_is_asked_for_its_own_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    device, asked = torch.device("xpu", 1), []
    stream = SimpleNamespace(device=device, record_event=lambda: "event")

    def answer(of: object) -> Any:
        asked.append(of)
        return stream

    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.xpu, name, answer)
    cuda = Cuda()
    assert cuda.queues(device)
    assert not cuda.queues(torch.device("cpu"))
    assert not cuda.is_capturing(device)
    assert cuda.new_stream(device) is stream
    assert cuda.stream(stream) is stream
    assert cuda.ready(device) == "event"
    assert asked == [device, stream, device]


@needs_cuda
def test_a_group_of_one_over_nccl() -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1, device_id=device)
    try:
        torch.manual_seed(0)
        model = mlp(64, 64, 64, 64, 64).to(device)
        twin = copy.deepcopy(model)
        with RHTState(**FINE, error_feedback=True) as state:
            ddp = wrapped(model, state, bucket_cap_mb=0.01)
            for step in range(4):
                x = numbers(0, step, shape=(8, 64)).to(device)
                for one in (ddp, twin):
                    one.zero_grad()
                    one(x).square().mean().backward()
                assert torch.equal(gradients_of(ddp), gradients_of(twin))
            assert isinstance(state.engine, StreamEngine)
            assert state.engine.topology.carriers() == [ddp.process_group]
        communicator, x = TorchCommunicator(), torch.arange(64, dtype=torch.uint8, device=device)
        assert torch.equal(communicator.start_all_gather(x)(), x[None])
        assert torch.equal(communicator.start_all_to_all(x[None])(), x[None])
        assert torch.equal(communicator.start_broadcast(x)(), x)
        total = torch.ones(3, device=device)
        communicator.all_reduce_(total)
        assert torch.equal(total, torch.ones(3, device=device))
    finally:
        dist.destroy_process_group()
