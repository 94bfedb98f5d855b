"""Whose ranks a state averages over, and how its own group comes about."""

import gc
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from models import backward, exact_mean, net, wrapped
from problems import nmse, numbers
from states import FINE, SOON, TIMEOUT, TOLERANCE, submit
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import TorchCommunicator
from rhtcomm.communicators.connecting import TRANSPORT
from rhtcomm.hooks import RHTState, rht_hook

# ---- Whose ranks ------------------------------------------------------------------------------


def hook_of_holder(
    holder: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """A hook whose state is inside another object."""
    return rht_hook(holder.state, bucket)


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
            ddp.register_comm_hook(holder, hook_of_holder)
        else:
            ddp = wrapped(model, state, **options)
        if how == "frozen":
            gc.freeze()
        found = backward(ddp, rank)
        gc.unfreeze()
    return nmse(found, exact_mean(model, [rank % 2, rank % 2 + 2]))


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
            backward(wrapped(net(), state, process_group=pair), rank)
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

    def register(ddp: DistributedDataParallel) -> DistributedDataParallel:
        pair = (SimpleNamespace(state=state), hook_of_holder) if inside else (state, rht_hook)
        ddp.register_comm_hook(*pair)
        return ddp

    first = register(DistributedDataParallel(net()))
    backward(first, rank)
    second = register(DistributedDataParallel(net(), process_group=pair))
    with pytest.raises(ValueError, match="give each model its own state") as caught:
        backward(second, rank)
    del first
    return str(caught.value)


@pytest.mark.parametrize("inside", [False, True])
def test_a_state_serves_no_second_model_of_other_ranks(inside: bool, ranks: Ranks) -> None:
    for message in ranks.run(register_again_elsewhere, 4, inside):
        assert "average" in message


# ---- Groups of states -------------------------------------------------------------------------


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
        with (
            pytest.MonkeyPatch.context() as patch,
            RHTState(**FINE, process_group=own, timeout=SOON) as state,
        ):
            patch.setenv(TRANSPORT, "gloo" if phase < 3 else "sockets")
            ddp = wrapped(model, state, process_group=own)
            time.sleep(0.2 * (rank % 2))
            errors.append(nmse(backward(ddp, rank, phase), exact_mean(model, members, phase)))
            if phase < 3:
                names.append(state.engine.topology.group.group_name)
    assert len(set(names)) == 3, "a name came back"
    with RHTState(**FINE, timeout=SOON) as state:  # the world, of which ranks count groups unlike
        ddp = wrapped(model, state)
        errors.append(nmse(backward(ddp, rank), exact_mean(model, [0, 1, 2, 3])))
    del leaders
    return errors


def test_ranks_agree_on_names_that_never_come_back(ranks: Ranks) -> None:
    for errors in ranks.run(in_several_groups, 4):
        assert max(errors) < TOLERANCE


def begin_in_many_threads(rank: int, world_size: int) -> list[float]:
    """Each with a model and a group of its own; the ranks' threads begin in another order."""
    groups = [dist.new_group(timeout=SOON) for _ in range(4)]
    models = [net(seed) for seed in range(4)]
    errors: list[float] = []

    def train(i: int) -> None:
        time.sleep(0.3 * (i if rank == 0 else 3 - i))
        for step in range(2):
            with RHTState(**FINE, timeout=TIMEOUT) as state:
                ddp = wrapped(models[i], state, process_group=groups[i])
                found = backward(ddp, rank, step)
            errors.append(nmse(found, exact_mean(models[i], list(range(world_size)), step)))

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


def train_on_more_groups_than_others(rank: int, world_size: int) -> list[float]:
    """Ranks 0 and 1 had one more model, with a group of its own; rank 0 had a look at a state."""
    pair = dist.new_group([0, 1])
    model = net()
    states = []
    if rank < 2:
        states.append(RHTState(**FINE, timeout=SOON))
        backward(wrapped(model, states[0], process_group=pair), rank)
        unused = RHTState(**FINE, timeout=SOON)
        kept = wrapped(model, unused, process_group=pair)
    if rank == 0:
        repr(RHTState())
    states.append(RHTState(**FINE, timeout=SOON))
    found = backward(wrapped(model, states[-1]), rank)
    for state in states:
        state.close()
    if rank < 2:
        del kept
    return [nmse(found, exact_mean(model, [0, 1, 2]))]


def test_states_of_other_groups_do_not_count(ranks: Ranks) -> None:
    assert max(max(errors) for errors in ranks.run(train_on_more_groups_than_others, 3)) < TOLERANCE


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
