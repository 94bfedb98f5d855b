"""Several connections to each other rank give what one gives, and end as one does."""

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from problems import numbers
from states import FINE, LOST_PEER, SOON, submit
from torch.distributed.device_mesh import init_device_mesh

import rhtcomm
from rhtcomm import HierarchicalCommunicator, TorchCommunicator
from rhtcomm.communicators.stripes import Stripes
from rhtcomm.hooks import RHTState
from rhtcomm.hooks.connect import connect

LENGTHS = (0, 5, 2 << 14, 100_001)  # too short twice, then in 2 and in 3 stripes
NUMEL = 100_000


@contextmanager
def used() -> Iterator[list[weakref.ref[Any]]]:
    """The groups of further connections that carry messages meanwhile."""
    group, found = Stripes.group, []

    def watched(self: Stripes, number: int) -> Any:
        found.append(weakref.ref(group(self, number)))
        return group(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stripes, "group", watched)
        yield found


def exchange(ranks: TorchCommunicator) -> list[torch.Tensor | None]:
    """The results of every exchange of every length, all of them in flight at once."""
    in_flight = []
    for length in LENGTHS:
        rows = numbers(ranks.rank, length, shape=(ranks.world_size, length)).view(torch.uint8)
        in_flight += [
            ranks.start_all_gather(rows[0]),
            ranks.start_all_to_all(rows),
            ranks.start_gather(rows[0]),
            ranks.start_broadcast(rows[0].clone()),
        ]
    results: list[torch.Tensor | None] = [finish() for finish in in_flight]
    ranks.settle()
    whole = torch.arange(NUMEL) * (1 + ranks.rank)
    ranks.all_reduce_(whole)
    return [*results, whole]


def mean(x: torch.Tensor, ranks: Any, **options: Any) -> torch.Tensor:
    x = x.clone()
    rhtcomm.all_reduce(x, rhtcomm.Codec(rhtcomm.QuicFL(4)), rhtcomm.Key(1), ranks, **options)
    return x


def stripe(rank: int, world_size: int) -> int:
    """Everything over one connection and over three; returns the number of further groups."""
    world = dist.group.WORLD
    assert world is not None
    one = TorchCommunicator.of_its_own(world, "cpu", SOON)
    given = TorchCommunicator(connections=3)
    several = [given, given.apart("cpu"), TorchCommunicator.of_its_own(world, "cpu", SOON, 3)]
    assert [ranks.connections for ranks in several] == [3] * 3
    expected, x = exchange(one), numbers(rank, shape=(NUMEL,))
    with used() as groups:
        for ranks in several:
            assert isinstance(ranks, TorchCommunicator)
            for result, other in zip(exchange(ranks), expected, strict=True):
                assert (result is None) == (other is None)
                assert result is None or other is None or torch.equal(result, other)
            assert ranks.bytes_sent == one.bytes_sent
    for algorithm in ("all_gather", "two_shot", "gather"):
        means = [mean(x, ranks, algorithm=algorithm) for ranks in (one, *several)]
        assert all(torch.equal(other, means[0]) for other in means)
    count = len({group() for group in groups})
    for ranks in (one, *several):
        ranks.close()
    assert [group() for group in groups if group() is not None] == []
    return count


def test_several_connections_give_the_bits_of_one(ranks: Ranks) -> None:
    assert ranks.run(stripe, 3) == [3 * 2] * 3


def differ(rank: int, world_size: int) -> list[str]:
    """What ranks say if they have different numbers of connections."""
    errors = []
    x = numbers(rank, shape=(NUMEL,))
    for call in (
        lambda: mean(x, TorchCommunicator(connections=1 + rank)),
        lambda: submit(RHTState(**FINE, connections=2 + rank), x).wait(),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        errors.append(str(error.value))
    return errors


def test_ranks_that_differ_in_it_say_so(ranks: Ranks) -> None:
    for errors in ranks.run(differ, 2):
        assert "connections (1 on rank 0; 2 on rank 1)" in errors[0]
        assert "connections (2 on rank 0; 3 on rank 1)" in errors[1]


def leave(rank: int, world_size: int) -> str:
    """One rank fails between two exchanges."""
    world = dist.group.WORLD
    assert world is not None
    ranks = TorchCommunicator.of_its_own(world, "cpu", SOON, 4)
    x = torch.zeros(1 << 20, dtype=torch.uint8)
    with used() as groups:
        ranks.all_gather(x)
    if rank == 1:
        ranks.abort()
        assert [group() for group in groups if group() is not None] == []
    with pytest.raises(RuntimeError) as error:
        ranks.all_gather(x)
    ranks.abort()
    return str(error.value)


def test_a_rank_that_fails_closes_all_its_connections(ranks: Ranks) -> None:
    first, second, third = ranks.run(leave, 3)
    assert "failed and left the group" in second
    assert all(re.search(LOST_PEER, error) for error in (first, third))


def stripe_between_nodes(rank: int, world_size: int) -> int:
    mesh, x = init_device_mesh("cpu", (2, 2)), numbers(rank, shape=(4 * NUMEL,))
    one = mean(x, HierarchicalCommunicator.from_mesh(mesh))
    several = HierarchicalCommunicator.from_mesh(mesh, connections=3)
    with used() as groups:
        assert torch.equal(mean(x, several), one)
    assert several.within.connections == 1
    apart = several.apart("cpu")
    assert (apart.within.connections, apart.between.connections) == (1, 3)
    apart.close()
    return len({group() for group in groups})


def test_two_levels_stripe_between_nodes(ranks: Ranks) -> None:
    assert ranks.run(stripe_between_nodes, 4) == [2] * 4


def refuse(rank: int, world_size: int) -> None:
    for make in (TorchCommunicator, RHTState):
        for odd, error in ((0, ValueError), (65, ValueError), (1.5, TypeError), ("4", TypeError)):
            with pytest.raises(error, match=r"connections=.*must be"):
                make(connections=odd)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave out process_group, timeout and connections"):
        RHTState(communicator=TorchCommunicator(), connections=2)
    world, cuda = dist.group.WORLD, torch.device("cuda")
    enqueues: Any = SimpleNamespace(
        enqueues=lambda device: True, between=SimpleNamespace(connections=2)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cpu:mpi,cuda:nccl")
        for call in (
            lambda: TorchCommunicator(connections=2),
            lambda: connect(cuda, world, None, None, 2),
            lambda: connect(cuda, None, enqueues, None),
        ):
            with pytest.raises(ValueError, match=r"connections=2 is for CPU tensors on Gloo"):
                call()


def test_where_there_can_be_one_connection_more_are_refused(ranks: Ranks) -> None:
    ranks.run(refuse, 1)
