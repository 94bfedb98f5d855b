"""A state from its first bucket to its end: whose ranks it averages over, by what, and who hears
of a failure; what copies and saved states hold.
"""

import copy
import gc
import io
import operator
import os
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, limit, run_program
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import rhtcomm
from rhtcomm import HierarchicalCommunicator, TorchCommunicator
from rhtcomm.communicator import Communicator, Users
from rhtcomm.hooks import RHTState, rht_hook

TIMEOUT = timedelta(seconds=limit(50))
FINE: dict[str, Any] = {"bits": 8, "block": 256, "min_numel": 0}
# At 8 bits the error of the mean is 4.4e-5; the mean of other ranks would be off by about 1.
TOLERANCE = 1e-3
# For what ends long before it unless somebody is left waiting.
SOON = timedelta(seconds=limit(30))


def numbers(rank: int, *place: int, shape: tuple[int, ...]) -> torch.Tensor:
    seed = 1000 * rank + sum(100**i * number for i, number in enumerate(place))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))


def registered(model: nn.Module, state: RHTState, **options: Any) -> DistributedDataParallel:
    ddp = DistributedDataParallel(model, **options)
    ddp.register_comm_hook(state, rht_hook)
    return ddp


def backward(ddp: nn.Module, rank: int, step: int = 0) -> torch.Tensor:
    """The gradients after one backward pass on this rank's data, flat."""
    ddp.zero_grad()
    ddp(numbers(rank, step, shape=(16, 32))).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in ddp.parameters()])


def exact_mean(model: nn.Module, members: list[int], step: int = 0) -> torch.Tensor:
    plain = copy.deepcopy(model)
    return torch.stack([backward(plain, rank, step) for rank in members]).mean(0)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum())


def submit(state: RHTState, buffer: torch.Tensor, index: int = 0, last: bool = True) -> Any:
    bucket = SimpleNamespace(
        buffer=lambda: buffer,
        index=lambda: index,
        is_last=lambda: last,
        parameters=lambda: [buffer],
    )
    return state.submit(bucket)


# ---- Whose ranks ------------------------------------------------------------------------------


def average_over_ddps_group(rank: int, world_size: int, how: str) -> float:
    """DDP has a group, the state was told nothing; the third model's state is inside another."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own = groups[rank % 2]
    options = {"process_group": own} if how in ("group", "frozen") else {}
    if how == "mesh":
        mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]))
        options = {"device_mesh": DeviceMesh.from_group(mesh.get_group(1), "cpu")}
    model = net()
    with RHTState(**FINE) as state:
        if how == "inside":
            ddp = DistributedDataParallel(model, process_group=own)
            holder = SimpleNamespace(state=state)

            def hook(holder: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
                return rht_hook(holder.state, bucket)

            ddp.register_comm_hook(holder, hook)
        else:
            ddp = registered(model, state, **options)
        if how == "frozen":
            gc.freeze()
        found = backward(ddp, rank)
        gc.unfreeze()
    return error(found, exact_mean(model, [rank % 2, rank % 2 + 2]))


@pytest.mark.parametrize("how", ["group", "mesh", "inside", "frozen"])
def test_a_state_averages_over_the_group_of_its_model(how: str, ranks: Ranks) -> None:
    assert max(ranks.run(average_over_ddps_group, 4, how)) < TOLERANCE


def contradict_ddp(rank: int, world_size: int) -> list[str]:
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    messages = []
    options: list[dict[str, Any]] = [
        {"process_group": dist.group.WORLD},
        {"communicator": TorchCommunicator()},
        {
            "communicator": TorchCommunicator(
                [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
            )
        },
    ]
    for option in options:
        state = RHTState(**FINE, **option)
        with pytest.raises(ValueError, match="averages over") as caught:
            backward(registered(net(), state, process_group=pair), rank)
        messages.append(str(caught.value))
    return messages


def test_a_group_that_is_not_the_models_is_refused(ranks: Ranks) -> None:
    for rank, (group, communicator, other) in enumerate(ranks.run(contradict_ddp, 4)):
        members = [0, 1] if rank < 2 else [2, 3]
        assert "has the ranks [0, 1, 2, 3], but the DDP model" in group
        assert f"averages over {members}" in group
        assert (
            "has 4 ranks, but the DDP model that it is registered on averages over 2"
            in communicator
        )
        assert f"has the ranks {[rank % 2, rank % 2 + 2]}, but the DDP model" in other


def register_again_elsewhere(rank: int, world_size: int, inside: bool) -> str:
    """After its first bucket, on a model of other ranks."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    state = RHTState(**FINE, timeout=SOON)

    def hook(holder: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        return rht_hook(holder.state, bucket)

    def register(ddp: DistributedDataParallel) -> DistributedDataParallel:
        pair = (SimpleNamespace(state=state), hook) if inside else (state, rht_hook)
        ddp.register_comm_hook(*pair)
        return ddp

    first = register(DistributedDataParallel(net()))
    backward(first, rank)
    second = register(DistributedDataParallel(net(), process_group=pair))
    with pytest.raises(ValueError, match="give each model a state of its own") as caught:
        backward(second, rank)
    del first
    return str(caught.value)


@pytest.mark.parametrize("inside", [False, True])
def test_a_state_serves_no_second_model_of_other_ranks(inside: bool, ranks: Ranks) -> None:
    for message in ranks.run(register_again_elsewhere, 4, inside):
        assert "average" in message


def contradict_ddp_on_rank_1(rank: int, world_size: int) -> tuple[str, float]:
    options = {"process_group": dist.new_group([1, 2])} if rank == 1 else {}
    dist.new_group([1, 2]) if rank == 2 else None
    state = RHTState(**FINE, **options, timeout=SOON)
    begin = time.monotonic()
    with pytest.raises((RuntimeError, ValueError)) as caught:
        backward(registered(net(), state), rank)
    return str(caught.value), time.monotonic() - begin


def test_a_group_that_one_rank_mistakes_wakes_the_others(ranks: Ranks) -> None:
    (first, waited), (second, _), (third, _) = ranks.run(contradict_ddp_on_rank_1, 3)
    assert "averages over [0, 1, 2]; leave process_group out" in second
    for message in (first, third):
        assert "another rank died, or failed and gave up" in message
    assert waited < SOON.total_seconds() / 2, "it was the timeout that woke them"


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
    first, second = (registered(m, s) for m, s in zip(models, states, strict=True))
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
            errors.append(error(model.weight.grad.double(), exact / world_size))
    for state in states:
        state.close()
    return errors


@pytest.mark.parametrize("how", ["groups", "object", "world", "mesh"])
def test_two_models_in_one_backward_pass_over_one_group(how: str, ranks: Ranks) -> None:
    for errors in ranks.run(two_models_at_once, 4 if how == "mesh" else 2, how):
        assert max(errors) < TOLERANCE


def reduce_complex_numbers(rank: int, world_size: int, dtype: torch.dtype) -> float:
    """As torch before 2.13 hands them over: in a bucket of their own dtype."""

    def of(rank: int) -> torch.Tensor:
        return torch.view_as_complex(numbers(rank, shape=(1000, 2))).to(dtype)

    buffer = of(rank)
    with RHTState(**FINE, timeout=TIMEOUT) as state:
        found = submit(state, buffer).wait()
    assert found.data_ptr() == buffer.data_ptr()
    assert found.dtype == dtype
    exact = torch.stack([of(r) for r in range(world_size)]).mean(0)
    return error(torch.view_as_real(found), torch.view_as_real(exact))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_buckets_of_complex_numbers(dtype: torch.dtype, ranks: Ranks) -> None:
    for found in ranks.run(reduce_complex_numbers, 2, dtype):
        assert found < (TOLERANCE if dtype == torch.complex64 else 1e-30)


class OfTheUser(TorchCommunicator):
    """Does something of its own on the way, so the hook has to go by it."""


def share_what_cannot_be_shared(rank: int, world_size: int) -> list[str]:
    communicator = OfTheUser(dist.new_group())
    states = [RHTState(**FINE, communicator=communicator) for _ in range(2)]
    torch.manual_seed(0)
    first, second = (registered(nn.Linear(32, 32), state) for state in states)
    x = numbers(rank, shape=(16, 32))
    first(x).square().mean().backward()
    second(x).square().mean().backward()  # by turns they may
    with pytest.raises(
        RuntimeError, match="give each a communicator over a group of its own"
    ) as at_once:
        second(first(x)).square().mean().backward()
    return [str(at_once.value)]


def test_a_communicator_serves_one_state_at_a_time(ranks: Ranks) -> None:
    for (message,) in ranks.run(share_what_cannot_be_shared, 2):
        assert "would send by" in message


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


def in_several_groups(rank: int, world_size: int) -> list[float]:
    """Ranks 0 and 2 are in one more group; and states come and go on each rank in its own time."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    leaders = dist.new_group([0, 2], use_local_synchronization=True) if rank in (0, 2) else None
    if rank == 2:
        more = dist.new_group([2], use_local_synchronization=True)
        dist.destroy_process_group(more)
    members, own = [[0, 1], [2, 3]][rank // 2], pairs[rank // 2]
    errors, names = [], []
    for phase in range(4):
        model = net()
        with RHTState(**FINE, process_group=own, timeout=SOON) as state:
            ddp = registered(model, state, process_group=own)
            time.sleep(0.2 * (rank % 2))
            errors.append(error(backward(ddp, rank, phase), exact_mean(model, members, phase)))
            names.append(state._group.group_name)
    assert len(set(names)) == 4, "a name came back"
    with RHTState(**FINE, timeout=SOON) as state:  # the world, of which ranks count groups unlike
        ddp = registered(model, state)
        errors.append(error(backward(ddp, rank), exact_mean(model, [0, 1, 2, 3])))
    del leaders
    return errors


def test_ranks_agree_on_names_that_never_come_back(ranks: Ranks) -> None:
    for errors in ranks.run(in_several_groups, 4):
        assert max(errors) < TOLERANCE


def connect_late(rank: int, world_size: int) -> bool:
    """Whether the last rank had all its connections when this one went on with its own."""
    store: Any = dist.distributed_c10d._get_default_store()
    connect = rhtcomm.communicator._GlooGroup

    def late(*arguments: Any) -> Any:
        group = connect(*arguments)
        if rank == 1:
            time.sleep(1)
            store.set("the last one has", "all its connections")
        return group

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rhtcomm.communicator, "_GlooGroup", late)
        made = TorchCommunicator.of_its_own(dist.group.WORLD, "cpu", SOON)
    known = bool(store.check(["the last one has"]))
    made.close()
    return known


def test_nobody_leaves_while_others_connect(ranks: Ranks) -> None:
    """One of those would fail then, and the rest would wait for that one until the timeout."""
    assert ranks.run(connect_late, 3) == [True] * 3


def begin_in_many_threads(rank: int, world_size: int) -> list[float]:
    """Each with a model and a group of its own; the ranks' threads begin in another order."""
    groups = [dist.new_group(timeout=SOON) for _ in range(4)]
    models = [net(seed) for seed in range(4)]
    errors: list[float] = []

    def train(i: int) -> None:
        time.sleep(0.3 * (i if rank == 0 else 3 - i))
        for step in range(2):
            with RHTState(**FINE, timeout=TIMEOUT) as state:
                ddp = registered(models[i], state, process_group=groups[i])
                found = backward(ddp, rank, step)
            errors.append(error(found, exact_mean(models[i], list(range(world_size)), step)))

    threads = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_states_of_many_threads_do_not_wait_for_each_other(ranks: Ranks) -> None:
    for errors in ranks.run(begin_in_many_threads, 2):
        assert len(errors) == 8, "a thread failed"
        assert max(errors) < TOLERANCE


def use_odd_meshes(rank: int, world_size: int) -> list[str]:
    messages = []
    with pytest.raises(ValueError, match="mesh") as caught:
        HierarchicalCommunicator.from_mesh(DeviceMesh("cpu", torch.tensor([[0, 1], [3, 2]])))
    messages.append(str(caught.value))
    # The same by hand: node 1 has its ranks the other way round for the groups between nodes.
    within = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    between = [dist.new_group([0, 3]), dist.new_group([1, 2])][rank in (1, 2)]
    communicator = HierarchicalCommunicator(within, between)
    x = numbers(rank, shape=(5000,))
    with pytest.raises(ValueError, match="at the same place of their nodes") as caught:
        rhtcomm.all_reduce(x, rhtcomm.Codec(rhtcomm.QuicFL(8)), rhtcomm.Key(0), communicator)
    messages.append(str(caught.value))
    return messages


def test_nodes_that_number_their_ranks_otherwise_are_refused(ranks: Ranks) -> None:
    for of_mesh, _ in ranks.run(use_odd_meshes, 4):
        assert "the mesh lists ranks as [[0, 1], [3, 2]]" in of_mesh


# ---- Who hears of a failure -------------------------------------------------------------------


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
    assert "sparse" in second or "integers" in second or "closed" in second
    for message in (first, third):
        assert "another rank died, or failed and gave up" in message
    assert waited < SOON.total_seconds() / 2, "it was the timeout that woke them"


CPU_GLOO = """
import torch, torch.distributed as dist
import rhtcomm.hooks.ddp as ddp
from datetime import timedelta
from functools import partial
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group({backend!r}, timeout=timedelta(seconds={seconds}))
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(64, 64))
state = ddp.RHTState(min_numel=0, block=256)
model.register_comm_hook(state, ddp.rht_hook)
model(torch.randn(8, 64)).square().mean().backward()

def broken(*_, **__):
    raise MemoryError("no memory left on this rank")

if rank == 1:
    ddp.all_reduce = broken
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
    assert "another rank died, or failed and gave up" in first.stdout, (first, second)
    assert "no memory left on this rank" in second.stdout


# ---- Copies and ends --------------------------------------------------------------------------


def copy_a_model_in_training(rank: int, world_size: int, quantizer: str) -> None:
    state = RHTState(**FINE, quantizer=quantizer, error_feedback=True, timeout=TIMEOUT)  # type: ignore[arg-type]
    ddp = registered(net(), state)
    average = AveragedModel(ddp)
    for step in range(2):
        backward(ddp, rank, step)
        average.update_parameters(ddp)
    twin = copy.deepcopy(ddp)
    file = io.BytesIO()
    torch.save(ddp, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for copied in (twin, loaded, AveragedModel(ddp).module):
        (_, own), *_ = copied._comm_hooks
        assert own is not state
        assert own._communicator is None
        # The copy of a model has no hook, so its state can be registered again, and goes on.
        fresh = DistributedDataParallel(copied.module)
        fresh.register_comm_hook(own, rht_hook)
        saved = state.state_dict(ddp), own.state_dict(fresh)
        assert saved[0]["step"] == saved[1]["step"] == 2
        for name, residual in saved[0]["residuals"].items():
            assert residual.any()
            assert torch.equal(residual, saved[1]["residuals"][name])
    # The last of them: the same payloads from here on.
    again = RHTState(**FINE, quantizer=quantizer, error_feedback=True, timeout=TIMEOUT)  # type: ignore[arg-type]
    other = registered(copy.deepcopy(ddp.module), again)
    again.load_state_dict(state.state_dict(ddp), other)
    assert torch.equal(backward(fresh, rank, 7), backward(other, rank, 7))
    for each in (state, own, again):
        each.close()
    plain = pickle.loads(pickle.dumps(RHTState(3, seed=5)))
    assert (plain.codec.quantizer.bits, plain.key.seed) == (3, 5)


@pytest.mark.parametrize("quantizer", ["quic_fl", "eden"])
def test_copies_have_no_group_and_go_on(quantizer: str, ranks: Ranks) -> None:
    ranks.run(copy_a_model_in_training, 2, quantizer)


def copy_within_a_step(rank: int, world_size: int) -> list[float]:
    """Between buckets, at another one on each rank, as a thread that saves might."""
    state = RHTState(**FINE, timeout=SOON)
    x = [numbers(rank, i, shape=(1000,)) for i in range(3)]
    exact = [torch.stack([numbers(r, i, shape=(1000,)) for r in range(2)]).mean(0) for i in (0, 1)]
    copies = []
    for index in range(3):
        submit(state, x[index].clone(), index, index == 2).wait()
        if index == rank:
            copies.append(copy.deepcopy(state))
    errors = []
    with copies[0] as copied:
        for _ in range(3):
            found = [submit(copied, x[i].clone(), i, i == 1).wait() for i in range(2)]
            errors += [error(f, e) for f, e in zip(found, exact, strict=True)]
    state.close()
    return errors


def test_copies_that_were_made_within_a_step_begin_one(ranks: Ranks) -> None:
    for errors in ranks.run(copy_within_a_step, 2):
        assert max(errors) < TOLERANCE


def leave_states_open(rank: int, world_size: int) -> tuple[list[int], list[int]]:
    """File descriptors, threads of Python and groups, after one and after six forgotten models."""

    def one() -> "weakref.ref[RHTState]":
        state = RHTState(**FINE)
        backward(registered(net(), state), rank)
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
    worker: Any = state._running.worker
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


# ---- Saved states of error feedback -----------------------------------------------------------


class Odd(nn.Module):
    """A convolution whose weights may lie channels last, and a complex matrix."""

    def __init__(self, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(4, 8, 3).to(memory_format=memory_format)  # type: ignore[call-overload]
        self.matrix = nn.Parameter(torch.randn(8, 16, dtype=torch.complex64))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.convolution(x).mean(dim=(2, 3))
        result: torch.Tensor = self.head((pooled.to(torch.complex64) @ self.matrix).abs())
        return result


def odd_state(model: nn.Module) -> tuple[RHTState, DistributedDataParallel]:
    state = RHTState(
        2, quantizer="eden", error_feedback=True, block=256, min_numel=0, timeout=TIMEOUT
    )
    return state, registered(model, state)


def train_odd(ddp: nn.Module, rank: int) -> None:
    for step in range(2):
        ddp.zero_grad()
        ddp(numbers(rank, step, shape=(5, 4, 8, 8))).square().mean().backward()


def move_residuals(rank: int, world_size: int) -> list[str]:
    last, first = torch.channels_last, torch.contiguous_format
    state, ddp = odd_state(Odd(last))
    train_odd(ddp, rank)
    saved = state.state_dict(ddp)
    assert (saved["rank"], saved["world_size"]) == (rank, world_size)
    shapes = {name: tuple(value.shape) for name, value in saved["residuals"].items()}
    assert shapes["convolution.weight"] == (8, 4, 3, 3)
    assert shapes["matrix"] == (8, 16, 2)
    # What is saved is by index, whatever the memory is: as the other format's, loaded and saved.
    other, other_ddp = odd_state(Odd(first))
    other.load_state_dict(saved, other_ddp)
    for name, value in other.state_dict(other_ddp)["residuals"].items():
        assert torch.equal(value, saved["residuals"][name]), name
    # And by what the residual means: the flat one of the step is in the bucket's order.
    weight = ddp.module.convolution.weight
    flat = state._residuals.gather([weight], torch.zeros(1))
    by_hand = flat.view(8, 3, 3, 4).permute(0, 3, 1, 2)
    assert torch.equal(by_hand, saved["residuals"]["convolution.weight"])
    # Buckets do not follow a parameter that changes its memory format.
    moved, moved_ddp = odd_state(Odd(first))
    train_odd(moved_ddp, rank)
    kept = moved.state_dict(moved_ddp)["residuals"]["convolution.weight"]
    moved_ddp.module.to(memory_format=last)
    moved._residuals.keep([moved_ddp.module.convolution.weight], kept.flatten())
    after_move = moved.state_dict(moved_ddp)["residuals"]["convolution.weight"]
    assert torch.equal(after_move, kept)
    moved.close()
    # Names are those of the model without its wrappers.
    compiled = torch.compile(ddp, backend="eager")
    for wrapper in (ddp.module, ddp, compiled, torch.compile(ddp.module, backend="eager")):
        assert state.state_dict(wrapper)["residuals"].keys() == saved["residuals"].keys()
        state.load_state_dict(saved, wrapper)  # type: ignore[arg-type]

    refused = []
    cases: list[tuple[dict[str, Any], nn.Module]] = [
        ({**saved, "rank": 1 - rank}, ddp),
        ({**saved, "world_size": 3}, ddp),
        ({name: value for name, value in saved.items() if name != "rank"}, ddp),
        (saved, net()),
        ({**saved, "residuals": {"matrix": torch.ones(256)}}, ddp),
    ]
    before = state.state_dict(ddp)
    for content, model in cases:
        with pytest.raises(ValueError, match="load_state_dict") as caught:
            state.load_state_dict({**content, "step": 9}, model)
        refused.append(str(caught.value))
        after = state.state_dict(ddp)
        assert after["step"] == before["step"], "half of it was taken"
        assert all(torch.equal(v, after["residuals"][k]) for k, v in before["residuals"].items())
    # To begin without residuals, as after a change of the number of ranks, is always possible.
    state.load_state_dict({**saved, "world_size": 3, "residuals": {}}, ddp)
    assert not len(state._residuals)

    # Residuals of parameters that are gone go too.
    train_odd(ddp, rank)
    model = ddp.module
    del ddp, compiled, wrapper, cases, weight
    state.close()
    model.head = nn.Linear(16, 4)
    gc.collect()
    assert set(state.state_dict(model)["residuals"]) == {
        "convolution.weight",
        "convolution.bias",
        "matrix",
    }
    other.close()
    return refused


def test_a_saved_state_says_what_it_is_of(ranks: Ranks) -> None:
    rank, size, absent, model, shape = ranks.run(move_residuals, 2)[0]
    assert "these are of rank 1 of 2, but this is rank 0 of 2" in rank
    assert "these are of rank 0 of 3, but this is rank 0 of 2" in size
    assert "these are of rank None of 2" in absent
    assert "but the model has none" in model
    assert "of shape (256,), but the model has it in shape (8, 16, 2)" in shape


def change_the_memory_format(rank: int, world_size: int, when: int, views: bool) -> list[float]:
    """Before a step, by step: |results + mean residual - exact means| / |exact means|, of sums."""
    torch.manual_seed(0)
    model = nn.Conv2d(8, 24, 3, bias=False)
    weight = model.weight
    state = RHTState(2, error_feedback=True, block=256, min_numel=0, timeout=TIMEOUT)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=views)
    ddp.register_comm_hook(state, rht_hook)
    model.forward = lambda x: (weight * x).sum()  # type: ignore[method-assign]
    errors = []
    results, exact = (torch.zeros(weight.shape, dtype=torch.float64) for _ in range(2))
    for step in range(4):
        if step == when:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ddp.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            ddp(numbers(rank, step, shape=tuple(weight.shape))).backward()
        results += weight.grad
        exact += sum(numbers(r, step, shape=tuple(weight.shape)) for r in range(2)) / 2
        left = state.state_dict(ddp)["residuals"]["weight"].double()
        dist.all_reduce(left)
        errors.append(float((results + left / 2 - exact).norm() / exact.norm()))
    state.close()
    return errors


@pytest.mark.parametrize(("when", "views"), [(0, True), (1, False), (1, True)])
def test_residuals_follow_the_layout_of_the_bucket(when: int, views: bool, ranks: Ranks) -> None:
    """DDP makes its buckets again in the second step, by how the parameters lie by then."""
    for errors in ranks.run(change_the_memory_format, 2, when, views):
        assert max(errors) < 1e-5


def load_before_the_ranks_are_known(rank: int, world_size: int) -> str:
    """A state that was loaded before torch.distributed began is checked at its first bucket."""
    state = RHTState(4, quantizer="eden", error_feedback=True, min_numel=0, timeout=TIMEOUT)
    model = net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        residuals = {"0.weight": torch.ones(64, 32)}
        state.load_state_dict(
            {"seed": 0, "step": 1, "rank": 0, "world_size": 2, "residuals": residuals}, model
        )
    with pytest.raises((ValueError, RuntimeError)) as caught:
        backward(registered(model, state), rank)
    return str(caught.value)


def test_another_ranks_state_is_found_out_at_the_first_bucket(ranks: Ranks) -> None:
    first, second = ranks.run(load_before_the_ranks_are_known, 2)
    assert "another rank died, or failed and gave up" in first
    assert "these are of rank 0 of 2, but this is rank 1 of 2" in second


# ---- Callers and arguments --------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(3),),
        ((torch.ones(3),),),
        (torch.ones(3), 1),
        (SimpleNamespace(buffer=lambda: torch.ones(3)),),
    ],
    ids=str,
)
def test_other_callers_are_told_what_the_hook_is_for(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"in place of a GradBucket.*FullyShardedDataParallel"):
        rht_hook(RHTState(), *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"process_group": "gloo"}, "process_group='gloo' must be a process group"),
        ({"communicator": rhtcomm.MPICommunicator}, "is a class; make an object of it"),
        ({"communicator": object()}, "must be an object such as"),
        ({"min_numel": 1.5}, r"RHTState: min_numel=1\.5 must be an integer"),
        ({"nmse_every": "1"}, "RHTState: nmse_every='1' must be an integer"),
        ({"seed": 0.5}, r"seed=0\.5 must be an integer"),
        ({"error_feedback": "no"}, "error_feedback='no' must be True or False"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RHTState(**arguments)


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_timeout_is_positive(seconds: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        RHTState(timeout=timedelta(seconds=seconds))
    with pytest.raises(ValueError, match="must be positive"):
        rhtcomm.MPICommunicator(timeout=seconds)


def test_mpis_timeout_is_in_seconds() -> None:
    with pytest.raises(TypeError, match="must be a number of seconds"):
        rhtcomm.MPICommunicator(timeout=SOON)  # type: ignore[arg-type]


@pytest.mark.parametrize("communicator", ["gloo", None, object(), TorchCommunicator])
def test_all_reduce_takes_communicators_alone(communicator: Any) -> None:
    codec = rhtcomm.Codec(rhtcomm.QuicFL(4))
    with pytest.raises(TypeError, match="must be an object such as"):
        rhtcomm.all_reduce(torch.ones(3), codec, rhtcomm.Key(0), communicator)


def test_all_reduce_takes_keys_alone() -> None:
    codec, communicator = rhtcomm.Codec(rhtcomm.QuicFL(4)), Communicator.__new__(OfTheUser)
    with pytest.raises(TypeError, match=r"key=3 must be a rhtcomm\.Key"):
        rhtcomm.all_reduce(torch.ones(3), codec, 3, communicator)  # type: ignore[arg-type]


def make_communicators_of_odd_things(rank: int, world_size: int) -> None:
    for odd in ("gloo", 3, TorchCommunicator()):
        with pytest.raises(TypeError, match="must be a process group"):
            TorchCommunicator(odd)  # type: ignore[arg-type]
    for odd in ("gloo", TorchCommunicator, None):
        with pytest.raises(TypeError, match="must be a communicator"):
            HierarchicalCommunicator(odd, TorchCommunicator())  # type: ignore[arg-type]


def test_communicators_take_groups_alone(ranks: Ranks) -> None:
    ranks.run(make_communicators_of_odd_things, 1)


def name_ranks(rank: int, world_size: int) -> list[str]:
    """Ranks 1 and 3 make a group, in which 3 is rank 1."""
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        return []
    messages = []
    state = RHTState(**FINE | {"bits": 3 + rank}, process_group=group, timeout=SOON)
    with pytest.raises(RuntimeError) as caught:
        submit(state, numbers(rank, shape=(1000,))).wait()
    messages.append(str(caught.value))
    state = RHTState(**FINE, process_group=group, timeout=SOON)
    submit(state, numbers(rank, shape=(1000,))).wait()
    if rank == 3:
        state.close()
        return messages
    with pytest.raises(RuntimeError) as caught:
        submit(state, numbers(rank, shape=(1000,))).wait()
    return [*messages, str(caught.value)]


def test_errors_name_ranks_of_the_group_and_of_the_world(ranks: Ranks) -> None:
    _, (differ, lost), _, _ = ranks.run(name_ranks, 4)
    assert "bits (4 on rank 0 (rank 1 of the world); 6 on rank 1 (rank 3 of the world))" in differ
    assert "rht_hook: rank 0 (rank 1 of the world) of 2 could not exchange" in lost


def follow_a_default_device(rank: int, world_size: int) -> None:
    """What torch makes by default lies elsewhere, but gradients, messages and tables do not."""
    torch.set_default_device("meta")
    try:
        x = numbers_on_cpu(rank)
        with RHTState(**FINE, algorithm="two_shot", timeout=TIMEOUT) as state:
            found = submit(state, x.clone()).wait()
            communicator = TorchCommunicator()
            rhtcomm.all_reduce(x, state.codec, rhtcomm.Key(0), communicator)
    finally:
        torch.set_default_device(None)
    exact = sum(numbers_on_cpu(r) for r in range(world_size)) / world_size
    assert error(found, exact) < TOLERANCE  # type: ignore[arg-type]
    assert error(x, exact) < TOLERANCE  # type: ignore[arg-type]


def numbers_on_cpu(rank: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(rank)
    return torch.randn(3000, generator=generator, device="cpu")


def test_a_default_device_changes_nothing(ranks: Ranks) -> None:
    ranks.run(follow_a_default_device, 3)


def test_a_protocol_has_harmless_defaults() -> None:
    class Alone(Communicator):
        bytes_sent, rank, world_size = 0, 0, 1

        def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> None:
            pass

    alone = Alone()
    assert alone.apart("cpu") is alone
    assert not alone.private
    assert alone.name_of(0) == "rank 0"


# ---- States that some ranks do not have -------------------------------------------------------


def train_on_more_groups_than_others(rank: int, world_size: int) -> list[float]:
    """Ranks 0 and 1 had one more model, with a group of its own; rank 0 had a look at a state."""
    pair = dist.new_group([0, 1])
    model = net()
    states = []
    if rank < 2:
        states.append(RHTState(**FINE, timeout=SOON))
        backward(registered(model, states[0], process_group=pair), rank)
        unused = RHTState(**FINE, timeout=SOON)
        kept = registered(model, unused, process_group=pair)
    if rank == 0:
        repr(RHTState())
    states.append(RHTState(**FINE, timeout=SOON))
    found = backward(registered(model, states[-1]), rank)
    for state in states:
        state.close()
    if rank < 2:
        del kept
    return [error(found, exact_mean(model, [0, 1, 2]))]


def test_states_of_other_groups_do_not_count(ranks: Ranks) -> None:
    assert max(max(errors) for errors in ranks.run(train_on_more_groups_than_others, 3)) < TOLERANCE


# ---- Communicators that states share, after a backward pass that fails ------------------------


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
    faulty = registered(Wrapped(), state, bucket_cap_mb=1e-4)
    for step in range(2):  # then the buckets are small ones
        backward(faulty, rank, step)
    Faulty.fails = True
    with pytest.raises(ValueError, match="the user's"):
        backward(faulty, rank)
    Faulty.fails = False
    model = net(1)
    with RHTState(**FINE, communicator=communicator) as another:
        return error(backward(registered(model, another), rank), exact_mean(model, [0, 1]))


def test_a_backward_pass_that_fails_keeps_no_communicator(ranks: Ranks) -> None:
    assert max(ranks.run(fail_within_backward, 2)) < TOLERANCE


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
            assert "another rank died, or failed and gave up" in process.stdout, process


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


def test_only_a_level_of_its_own_is_closed() -> None:
    closed = []
    levels: list[Any] = [
        SimpleNamespace(private=private, close=partial(closed.append, private), start_all_gather=0)
        for private in (False, True)
    ]
    HierarchicalCommunicator(*levels).close()
    assert closed == [True]


# ---- What else a state may be given -----------------------------------------------------------


@pytest.mark.parametrize(
    ("junk", "message"),
    [
        (None, "is None"),
        ([1, 2], r"is \[1, 2\]"),
        ({"seed": 0, "step": 1, "residuals": {}, "rotations": 3}, "rotations must hold"),
        ({"seed": 0, "step": 1, "residuals": {}, "rotations": [[1, 2]]}, "rotations must hold"),
        ({"seed": 0, "step": 1, "residuals": {}, "rotations": [["a", 1, 2]]}, "rotations must"),
        ({"seed": 0, "step": 1, "residuals": [1]}, "residuals must be a dictionary"),
        *(
            (
                {"seed": 0, "step": 1, "rank": 0, "world_size": 1, "residuals": {"0.bias": value}},
                "residuals are dense tensors of finite real numbers",
            )
            for value in (
                [0.0] * 64,
                torch.zeros(64).to_sparse(),
                torch.zeros(64, dtype=torch.complex64),
                torch.full((64,), torch.nan),
            )
        ),
    ],
    ids=str,
)
def test_junk_is_no_saved_state(junk: Any, message: str) -> None:
    with RHTState(rotations="auto", error_feedback=True) as state:
        before = state.state_dict(net())
        with pytest.raises(ValueError, match=message):
            state.load_state_dict(junk, net())
        assert state.state_dict(net()) == before


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


def test_a_shallow_copy_counts_for_itself() -> None:
    state = RHTState(rotations="auto")
    other = copy.copy(state)
    other.load_state_dict({"seed": 0, "step": 1, "rotations": [[0, 1000, 1]]})
    other._taken[1] += 1
    other._ends.add(3)
    assert state.state_dict()["rotations"] == []
    assert state.stats().rotations == {1: 0, 2: 0, 3: 0}
    assert not state._ends
