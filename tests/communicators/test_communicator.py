"""The exchanges, against what they are defined to give."""

import time
import weakref
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from problems import numbers
from states import SOON

import rhtcomm
from rhtcomm import HierarchicalCommunicator, TorchCommunicator
from rhtcomm.communicators import Communicator, gloo
from rhtcomm.communicators import torch as transport
from rhtcomm.communicators.connecting import TRANSPORT
from rhtcomm.communicators.sockets import SocketCommunicator

OVER = ("world", "gloo", "sockets")
LENGTHS = (0, 1, 7, 8, 9, 16, 17, 100, 3_000_000)


def row_of(sender: int, receiver: int, length: int) -> torch.Tensor:
    """(length,) uint8 that differ between all pairs of ranks and along the row."""
    return (torch.arange(length) * 7 + 31 * sender + 101 * receiver).to(torch.uint8)


def communicator(over: str) -> Communicator:
    """The world's group itself, or private connections of its ranks."""
    world = TorchCommunicator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRANSPORT, over)
        made = world if over == "world" else world.apart("cpu")
    assert isinstance(made, SocketCommunicator) == (over == "sockets")
    assert made.private == (over != "world")
    assert made.bytes_sent == 0
    return made


def exchange(rank: int, world_size: int, over: str) -> int:
    """Every exchange at every length, all in flight at once; returns the bytes counted."""
    ranks = communicator(over)
    assert (ranks.rank, ranks.world_size) == (rank, world_size)
    everyone = range(world_size)
    in_flight = []
    for length in LENGTHS:
        rows = torch.stack([row_of(rank, receiver, length) for receiver in everyone])
        in_flight += [
            ranks.start_all_gather(rows[0]),
            ranks.start_all_to_all(rows),
            ranks.start_gather(rows[0]),
            ranks.start_broadcast(row_of(rank, 3, length)),
        ]
    results = [finish() for finish in in_flight]
    ranks.settle()
    for index, length in enumerate(LENGTHS):
        gathered, received, collected, announced = results[4 * index : 4 * index + 4]
        of_all = torch.stack([row_of(sender, 0, length) for sender in everyone])
        for_me = torch.stack([row_of(sender, rank, length) for sender in everyone])
        assert gathered is not None
        assert gathered.dtype == torch.uint8
        assert torch.equal(gathered, of_all), f"all_gather of {length}"
        assert torch.equal(received, for_me), f"all_to_all of {length}"
        if rank == 0:
            assert torch.equal(collected, of_all), f"gather of {length}"
        else:
            assert collected is None
        assert torch.equal(announced, row_of(0, 3, length)), f"broadcast of {length}"
    return ranks.bytes_sent


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("over", OVER)
def test_many_exchanges_in_flight(over: str, world_size: int, ranks: Ranks) -> None:
    # Each rank sends one row to each other one, in either of the first two exchanges; then it sends
    # one to rank 0, which sends one to each.
    row = sum(LENGTHS)
    expected = [2 * (world_size - 1) * row + row for _ in range(world_size)]
    expected[0] = 3 * (world_size - 1) * row
    assert ranks.run(exchange, world_size, over) == expected


def send_and_overwrite(rank: int, world_size: int, over: str) -> None:
    """What was sent may be overwritten once the others have it, however late they ask for it."""
    ranks = communicator(over)
    for _ in range(3):
        rows = torch.stack([row_of(rank, receiver, 1_000_000) for receiver in range(world_size)])
        dist.barrier()
        time.sleep(0.1 * rank)
        finish = ranks.start_all_to_all(rows)
        received = finish()
        ranks.settle()
        rows.zero_()
        for sender in range(world_size):
            assert torch.equal(received[sender], row_of(sender, rank, 1_000_000))
    ranks.settle()  # nothing was sent since


@pytest.mark.parametrize("over", OVER)
def test_after_settle_the_others_have_what_was_sent(over: str, ranks: Ranks) -> None:
    ranks.run(send_and_overwrite, 3, over)


class LoggedWork:
    def __init__(self, work: dist.Work, name: str, log: list[str]) -> None:
        self.work, self.name, self.log = work, name, log

    def wait(self) -> None:
        self.log.append(f"wait {self.name}")
        self.work.wait()


class Logged(TorchCommunicator):
    """Logs the messages that it posts and waits for; knows which of those sent it still keeps."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.kept: weakref.WeakSet[LoggedWork] = weakref.WeakSet()
        super().__init__()

    @property
    def group(self) -> Any:
        return LoggedGroup(super().group, self)


class LoggedGroup:
    def __init__(self, group: dist.ProcessGroup, owner: Logged) -> None:
        self.group, self.owner = group, owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def send(self, *args: Any) -> LoggedWork:
        sent = self.post("send", *args)
        self.owner.kept.add(sent)
        return sent

    def recv(self, *args: Any) -> LoggedWork:
        return self.post("recv", *args)

    def post(self, name: str, *args: Any) -> LoggedWork:
        self.owner.log.append(name)
        return LoggedWork(getattr(self.group, name)(*args), name, self.owner.log)


def send_and_forget(rank: int, world_size: int) -> list[int]:
    """Exchanges that nobody waits to see arrive, of tensors that nobody else keeps."""
    ranks, kept = Logged(), []
    for turn in range(6):
        time.sleep(0.02 * ((rank + turn) % world_size))
        finish = ranks.start_all_gather(row_of(rank, turn, 300_000))
        torch.full((300_000,), 255, dtype=torch.uint8)  # would take memory that was given back
        of_all = torch.stack([row_of(sender, turn, 300_000) for sender in range(world_size)])
        assert torch.equal(finish(), of_all)
        ranks.settle(wait=False)
        x = row_of(rank, turn, 300_000)
        collected = ranks.start_gather(x)()
        assert collected is None or torch.equal(collected, of_all)
        assert torch.equal(ranks.start_broadcast(x)(), of_all[0])
        ranks.settle(wait=False)
        kept.append(len(ranks.kept))
    ranks.settle()
    return kept


def test_what_was_sent_is_kept_until_the_others_show_that_they_have_it(ranks: Ranks) -> None:
    leader, *others = ranks.run(send_and_forget, 3)
    # Of the gather and the broadcast. From each other, ranks 1 and 2 hear again in the next turn.
    assert leader == [2] * 6
    assert all(kept == [1 + 1] * 6 for kept in others)


def log_messages(rank: int, world_size: int, turns: list[int], length: int) -> list[str]:
    """Turns of so many exchanges in flight at once."""
    ranks = Logged()
    for exchanges in turns:
        in_flight = [ranks.start_all_gather(row_of(rank, 0, length)) for _ in range(exchanges)]
        for finish in in_flight:
            finish()
        ranks.settle(wait=False)
    ranks.settle()
    return ranks.log


def test_sends_are_waited_for_after_a_later_message_of_the_others(ranks: Ranks) -> None:
    """And acknowledgements are asked for before they are sent, so that all have left in the end."""
    send, recv, waits, sent = ["send"] * 2, ["recv"] * 2, ["wait recv"] * 2, ["wait send"] * 2
    for log in ranks.run(log_messages, 3, [1], 9):
        assert log == send + recv + waits + recv + send + waits + sent
    for log in ranks.run(log_messages, 3, [1], 1 << 18):
        assert log == recv + send + waits + recv + send + waits + sent
    for log in ranks.run(log_messages, 3, [1, 2, 1], 9):
        expected = send + recv + waits
        expected += send + recv + recv + send + waits + sent + waits
        expected += send + recv + waits + sent + sent
        assert log == expected + recv + send + waits + sent


def give_up(rank: int, world_size: int, over: str) -> None:
    x = torch.tensor([rank], dtype=torch.uint8)
    own = communicator(over) if over != "group" else TorchCommunicator(dist.new_group())
    world = TorchCommunicator()
    own.all_gather(x)
    if rank == 0:
        own.abort()
        own.abort()
        gave_up = r"rank 0 of 3 (failed and left|has closed its).*restart the program"
        with pytest.raises(RuntimeError, match=gave_up):
            own.all_gather(x)
    else:
        with pytest.raises(RuntimeError, match=r"(?i)closed by|reset by|broken pipe"):
            own.all_gather(x)
    world.all_gather(x)
    world.abort()
    with pytest.raises(RuntimeError, match="failed and left the group"):
        world.all_gather(x)
    dist.barrier()  # the world is not the communicator's alone


@pytest.mark.parametrize("over", ["group", "gloo", "sockets"])
def test_abort(over: str, ranks: Ranks) -> None:
    ranks.run(give_up, 3, over)


def exchange_strided(rank: int, world_size: int, over: str) -> None:
    """Rows that are columns of something else."""
    rows = torch.stack([row_of(rank, receiver, 9) for receiver in range(world_size)])
    received = communicator(over).all_to_all(rows.t().contiguous().t())
    for sender in range(world_size):
        assert torch.equal(received[sender], row_of(sender, rank, 9))


@pytest.mark.parametrize("over", OVER)
def test_all_to_all_of_a_strided_tensor(over: str, ranks: Ranks) -> None:
    ranks.run(exchange_strided, 3, over)


def reduce(
    rank: int, world_size: int, over: str, numel: int
) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
    ranks = communicator(over)
    x = numbers(rank, shape=(numel,))
    y, z = x.clone(), (1000 * x).long()
    ranks.all_reduce_(x)
    sent = ranks.bytes_sent
    ranks.all_reduce_(y, "max")
    ranks.all_reduce_(z)
    return x, sent, y, z


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("over", "numel"), [*product(OVER, (1, 1001, 100_000)), ("sockets", 3 << 20)]
)
def test_all_reduce_sums_alike_on_every_rank(
    over: str, world_size: int, numel: int, ranks: Ranks
) -> None:
    results = ranks.run(reduce, world_size, over, numel)
    of_ranks = [numbers(rank, shape=(numel,)) for rank in range(world_size)]
    exact = sum(x.double() for x in of_ranks)
    for total, sent, largest, integers in results:
        assert torch.equal(largest, torch.stack(of_ranks).amax(dim=0))
        assert torch.equal(integers, sum((1000 * x).long() for x in of_ranks))
        # Normal numbers stay below 8, a sum of n of them takes n - 1 roundings of at most 2^-24.
        torch.testing.assert_close(
            total.double(), exact, rtol=0, atol=8 * world_size * (world_size - 1) * 2**-24
        )
        assert torch.equal(total, results[0][0])
        assert sent == round(2 * (world_size - 1) / world_size * 4 * numel)


def exchange_in_subgroup(rank: int, world_size: int) -> list[list[int]] | str:
    members = [1, 3]
    group = dist.new_group(members)
    if rank not in members:
        with pytest.raises(RuntimeError, match="not a member of the group"):
            TorchCommunicator(group)
        return "not a member"
    ranks = TorchCommunicator(group)
    assert (ranks.rank, ranks.world_size) == (members.index(rank), 2)
    x = torch.tensor([rank], dtype=torch.uint8)
    total = torch.tensor([float(rank)])
    ranks.all_reduce_(total)
    collected = ranks.start_gather(x)()
    assert (collected is None) == (rank == 3)
    assert collected is None or collected.tolist() == [[1], [3]]
    assert ranks.start_broadcast(x.clone())().tolist() == [1]
    return [
        ranks.all_gather(x).tolist(),
        ranks.all_to_all(torch.tensor([[rank], [10 * rank]], dtype=torch.uint8)).tolist(),
        total.tolist(),
    ]


def test_subgroup(ranks: Ranks) -> None:
    outside = "not a member"
    assert ranks.run(exchange_in_subgroup, 4) == [
        outside,
        [[[1], [3]], [[1], [3]], [4.0]],
        outside,
        [[[1], [3]], [[10], [30]], [4.0]],
    ]


def test_without_torch_distributed_the_error_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"not initialized; call.*init_process_group"):
        TorchCommunicator()


def connect_late(rank: int, world_size: int, over: str) -> bool:
    """Whether the last rank had all its connections when this one went on with its own."""
    store: Any = dist.distributed_c10d._get_default_store()
    module, name = (gloo, "Group") if over == "gloo" else (transport, "open_sockets")
    connect = getattr(module, name)

    def late(*arguments: Any) -> Any:
        group = connect(*arguments)
        if rank == 1:
            time.sleep(1)
            store.set("the last one has", "all its connections")
        return group

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, late)
        made = communicator(over)
    known = bool(store.check(["the last one has"]))
    made.close()
    return known


@pytest.mark.parametrize("over", ["gloo", "sockets"])
def test_nobody_leaves_while_others_connect(over: str, ranks: Ranks) -> None:
    """One of those would fail then, and the rest would wait for that one until the timeout."""
    assert ranks.run(connect_late, 3, over) == [True] * 3


def make_communicators_of_odd_things(rank: int, world_size: int) -> None:
    for odd in ("gloo", 3, TorchCommunicator()):
        with pytest.raises(TypeError, match="must be a process group"):
            TorchCommunicator(odd)  # type: ignore[arg-type]
    for odd in ("gloo", TorchCommunicator, None):
        with pytest.raises(TypeError, match="must be a communicator"):
            HierarchicalCommunicator(odd, TorchCommunicator())  # type: ignore[arg-type]


def test_communicators_take_groups_alone(ranks: Ranks) -> None:
    ranks.run(make_communicators_of_odd_things, 1)


def test_mpis_timeout_is_in_seconds() -> None:
    with pytest.raises(TypeError, match="must be a number of seconds"):
        rhtcomm.MPICommunicator(timeout=SOON)  # type: ignore[arg-type]


def test_a_protocol_has_harmless_defaults() -> None:
    class Alone(Communicator):
        bytes_sent, rank, world_size = 0, 0, 1

        def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> None:
            pass

    alone = Alone()
    assert alone.apart("cpu") is alone
    assert not alone.private
    assert alone.name_of(0) == "rank 0"


def test_only_a_level_of_its_own_is_closed() -> None:
    closed = []
    levels: list[Any] = [
        SimpleNamespace(private=private, close=partial(closed.append, private), start_all_gather=0)
        for private in (False, True)
    ]
    HierarchicalCommunicator(*levels).close()
    assert closed == [True]
