"""Several connections to each other rank give what one gives, and end as one does."""

import re
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
from rhtcomm.communicators import Communicator
from rhtcomm.communicators.connecting import TRANSPORT
from rhtcomm.communicators.connection import Connection
from rhtcomm.hooks import RHTState
from rhtcomm.hooks.connect import connect

LENGTHS = (0, 5, 2 << 14, 100_001)  # too short twice, then in 2 and in 3 stripes
NUMEL = 100_000


class Used:
    """The sockets that carry messages meanwhile."""

    def __init__(self) -> None:
        self._sockets: dict[int, Connection] = {}

    @contextmanager
    def watch(self) -> Iterator["Used"]:
        send = Connection.send

        def watched(connection: Connection, message: memoryview, length: int) -> int:
            self._sockets[id(connection)] = connection
            return send(connection, message, length)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "send", watched)
            yield self

    @property
    def open(self) -> int:
        return sum(one.fileno() >= 0 for one in self._sockets.values())


def exchange(ranks: Communicator) -> list[torch.Tensor | None]:
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
    """Everything over one connection and over three; returns what carries the latter."""
    world = dist.group.WORLD
    assert world is not None
    one = TorchCommunicator.of_its_own(world, "cpu", SOON)
    several = [
        TorchCommunicator(connections=3).apart("cpu"),
        TorchCommunicator.of_its_own(world, "cpu", SOON, 5),
    ]
    assert [ranks.connections for ranks in several] == [3, 5]
    expected, x = exchange(one), numbers(rank, shape=(NUMEL,))
    with Used().watch() as used:
        for ranks in several:
            for result, other in zip(exchange(ranks), expected, strict=True):
                assert (result is None) == (other is None)
                assert result is None or other is None or torch.equal(result, other)
            assert ranks.bytes_sent == one.bytes_sent
    for algorithm in ("all_gather", "two_shot", "gather"):
        means = [mean(x, ranks, algorithm=algorithm) for ranks in (one, *several)]
        assert all(torch.equal(other, means[0]) for other in means)
    count = used.open
    for ranks in (one, *several):
        ranks.close()
    assert used.open == 0
    return count


def test_several_connections_give_the_bits_of_one(ranks: Ranks) -> None:
    assert ranks.run(stripe, 3) == [(3 + 5) * 2] * 3


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


def differ_in_length(rank: int, world_size: int) -> str:
    """60000 bytes are three stripes of 20000; 40000 are two of them."""
    ranks = TorchCommunicator.of_its_own(dist.group.WORLD, "cpu", SOON, 3)
    with pytest.raises(RuntimeError) as error:
        ranks.all_gather(torch.zeros(60_000 - 20_000 * rank, dtype=torch.uint8))
    dist.barrier()
    ranks.close()
    return str(error.value)


def test_stripes_of_another_message_are_an_error(ranks: Ranks) -> None:
    first, second = ranks.run(differ_in_length, 2)
    expected = ("sent 40000 bytes where 60000 were", "sent 60000 bytes where 40000 were")
    # Whoever finds out first closes its connections.
    assert expected[0] in first or expected[1] in second
    assert all(re.search(f"{LOST_PEER}|bytes where", said) for said in (first, second))


def leave(rank: int, world_size: int) -> str:
    """One rank fails between two exchanges."""
    world = dist.group.WORLD
    assert world is not None
    ranks = TorchCommunicator.of_its_own(world, "cpu", SOON, 3)
    x = torch.zeros(1 << 20, dtype=torch.uint8)
    with Used().watch() as used:
        ranks.all_gather(x)
    assert used.open == 6
    if rank == 1:
        ranks.abort()
        assert used.open == 0
    with pytest.raises(RuntimeError) as error:
        ranks.all_gather(x)
    ranks.abort()
    return str(error.value)


def test_a_rank_that_fails_closes_all_its_connections(ranks: Ranks) -> None:
    first, second, third = ranks.run(leave, 3)
    assert "has closed its connections" in second
    assert all(re.search(LOST_PEER, error) for error in (first, third))


def stripe_between_nodes(rank: int, world_size: int) -> int:
    mesh, x = init_device_mesh("cpu", (2, 2)), numbers(rank, shape=(4 * NUMEL,))
    one = mean(x, HierarchicalCommunicator.from_mesh(mesh))
    several = HierarchicalCommunicator.from_mesh(mesh, connections=3).apart("cpu")
    assert (several.within.connections, several.between.connections) == (1, 3)
    with Used().watch() as used:
        assert torch.equal(mean(x, several), one)
        count = used.open
    several.close()
    return count


def test_two_levels_stripe_between_nodes(ranks: Ranks) -> None:
    assert ranks.run(stripe_between_nodes, 4) == [1 + 3] * 4


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
            with pytest.raises(ValueError, match=r"connections=2 is for CPU tensors over sockets"):
                call()


def refuse_on_gloo(rank: int, world_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setenv(TRANSPORT, "gloo")
        why = r"over a private Gloo group, since on rank 1 RHTCOMM_TRANSPORT is gloo"
        with pytest.raises(ValueError, match=rf"connections=2 is .* {why}"):
            TorchCommunicator(connections=2).apart("cpu")


def test_gloo_has_one_connection(ranks: Ranks) -> None:
    ranks.run(refuse_on_gloo, 2)


def test_where_there_can_be_one_connection_more_are_refused(ranks: Ranks) -> None:
    ranks.run(refuse, 1)
