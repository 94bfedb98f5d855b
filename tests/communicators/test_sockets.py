"""Private connections by sockets: how they are made, and what ranks hear when one fails."""

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from states import LOST_PEER, SOON

from rhtcomm import TorchCommunicator
from rhtcomm.communicators import Communicator, connecting
from rhtcomm.communicators.connecting import TRANSPORT
from rhtcomm.communicators.connection import Connection
from rhtcomm.communicators.sockets import SocketCommunicator

# ---- One connection ---------------------------------------------------------------------------


def connected() -> tuple[Connection, Connection]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    return Connection(here, "rank 1"), Connection(there, "rank 0")


def test_messages_arrive_in_order_however_the_kernel_cuts_them() -> None:
    here, there = connected()
    lengths = [0, 1, 7, 8, 9, 0, 30_000_000, 2, 0, *[3] * 100, 5_000_000]
    generator = torch.Generator().manual_seed(1)
    sent = [torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in lengths]
    received = [torch.empty_like(message) for message in sent]
    for message in sent:
        here.send(message.numpy().data)
    assert here.leaving, "the kernel takes all at once, so nothing is cut"
    assert here.wants
    numbers = [there.expect(message.numpy().data) for message in received]
    assert numbers == [*range(1, len(lengths) + 1)]
    while there.arrived < numbers[-1]:
        here.push()
        there.pull()
    assert not here.leaving
    assert not here.wants
    assert not there.wants
    assert all(map(torch.equal, sent, received))


def take_one(connection: Connection, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not connection.arrived:
        connection.pull()
        assert time.monotonic() < end


def test_a_message_of_another_length_is_an_error() -> None:
    here, there = connected()
    here.send(memoryview(bytes(5)))
    there.expect(memoryview(bytearray(4)))
    with pytest.raises(RuntimeError, match=r"rank 0 sent 5 bytes where 4 were .*different calls"):
        take_one(there)


def test_what_was_sent_arrives_after_the_connection_is_closed() -> None:
    here, there = connected()
    here.send(memoryview(b"last"))
    here.close()
    last = bytearray(4)
    there.expect(memoryview(last))
    take_one(there)
    assert last == b"last"
    there.expect(memoryview(last))
    with pytest.raises(RuntimeError, match="rank 0: Connection closed by peer"):
        there.pull()


def test_an_idle_connection_is_probed() -> None:
    """Otherwise a firewall forgets it, and the end of a machine without a word is never noticed."""
    for one in connected():
        with socket.socket(fileno=os.dup(one.fileno())) as same:
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            seconds = same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            seconds += same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) * (
                same.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
            )
        assert seconds == 660, "the documentation says eleven minutes"


def test_a_forked_process_does_not_end_the_connection() -> None:
    """Such as one that loads data: it has copies of the sockets, and collects garbage."""
    here, there = connected()
    child = os.fork()
    if not child:
        here.close()
        os._exit(0)
    os.waitpid(child, 0)
    here.send(memoryview(b"more"))
    there.expect(memoryview(more := bytearray(4)))
    take_one(there)
    assert more == b"more"


DEATH_OF_A_PARENT = """
import os, signal, socket, sys, time
from rhtcomm.communicators.connection import Connection

connection = Connection(socket.create_connection(("127.0.0.1", int(sys.argv[1]))), "rank 0")
child = os.fork()
if not child:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_ends_it_although_a_forked_one_lives() -> None:
    """Such as one that loads data, which notices the end of its parent after seconds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-c", DEATH_OF_A_PARENT, port]
        killed = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        there = Connection(listener.accept()[0], "rank 1")
    assert killed.returncode == -signal.SIGKILL
    there.expect(memoryview(bytearray(4)))
    with pytest.raises(RuntimeError, match="rank 1: Connection closed by peer"):
        take_one(there, SOON.total_seconds() / 2)
    os.kill(int(killed.stdout), signal.SIGKILL)


def test_a_peer_that_is_gone_raises_no_signal() -> None:
    """It would end a program that has restored the default of SIGPIPE."""
    here, there = connected()
    there.close()
    signals: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda number, _: signals.append(number))

    def send() -> None:
        for _ in range(100):
            here.send(memoryview(bytes(1000)))
            time.sleep(0.01)

    try:
        with pytest.raises(RuntimeError, match=r"rank 1: .*([Bb]roken pipe|reset by peer)"):
            send()
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert not signals


def test_what_the_other_side_has_not_is_counted() -> None:
    here, there = connected()
    message = memoryview(bytearray(30_000_000))
    here.send(message)
    assert here.undelivered > 0
    there.expect(message)
    while not there.arrived:
        here.push()
        there.pull()
    deadline = time.monotonic() + SOON.total_seconds()
    while here.undelivered and time.monotonic() < deadline:
        time.sleep(0.001)
    assert here.undelivered == 0
    here.close()
    assert here.undelivered == 0


# ---- How they are made ------------------------------------------------------------------------


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def make(log: Log | None = None) -> Communicator:
    logger = logging.getLogger("rhtcomm")
    logger.setLevel(logging.INFO)
    if log is not None:
        logger.addHandler(log)
    try:
        return TorchCommunicator().apart("cpu")
    finally:
        if log is not None:
            logger.removeHandler(log)


def works(ranks: Communicator) -> bool:
    x = torch.tensor([ranks.rank], dtype=torch.uint8)
    return ranks.all_gather(x).flatten().tolist() == [*range(ranks.world_size)]


def prevented(rank: int, patch: pytest.MonkeyPatch, how: str) -> None:
    """Rank 1 cannot or must not connect by sockets; the others wait for it in vain."""
    patch.setattr(connecting, "_SECONDS", 0.5)
    if rank != 1:
        return

    def broken(*_: Any) -> Any:
        raise OSError("made by the test")

    if how == "asked":
        patch.setenv(TRANSPORT, "gloo")
    elif how == "tls":
        patch.setenv("GLOO_DEVICE_TRANSPORT", "TCP_TLS")
    elif how == "system":
        patch.setattr(connecting.sys, "platform", "another")  # type: ignore[attr-defined]
    elif how == "listen":
        patch.setattr(socket.socket, "listen", broken)
    elif how == "call":
        patch.setattr(socket.socket, "connect_ex", broken)
    else:
        patch.setattr(socket.socket, "accept", broken)


PREVENTED = {
    "asked": "INFO .*rank 1 RHTCOMM_TRANSPORT is gloo",
    "tls": "INFO .*rank 1 GLOO_DEVICE_TRANSPORT is not TCP",
    "system": "INFO .*rank 1 the system is not Linux",
    "listen": "WARNING .*rank 1 made by the test",
    "call": "WARNING .*rank 1 made by the test",
    "accept": "WARNING .*rank 1 made by the test",
}


def make_where_one_cannot(rank: int, world_size: int) -> dict[str, list[str]]:
    """What the log says; descriptors that were opened in vain are closed."""
    found = {}
    for how in PREVENTED:
        log = Log()
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(TRANSPORT, raising=False)
            prevented(rank, patch, how)
            made = make(log)
        assert isinstance(made, TorchCommunicator)
        assert made.private
        assert works(made)
        made.close()
        found[how] = log.lines
    return found


def test_if_one_rank_cannot_connect_all_go_through_gloo(ranks: Ranks) -> None:
    for found in ranks.run(make_where_one_cannot, 3):
        for how, pattern in PREVENTED.items():
            (line,) = found[how]
            assert re.search(pattern, line), f"{how}: {line}"


def make_with_a_stranger(rank: int, world_size: int) -> int:
    """Rank 0 hears from somebody who is no rank, before the others call it."""
    listener, strangers = connecting._listener, []

    def visited(callers: int) -> socket.socket:
        made = listener(callers)
        for greeting in (b"", b"\0" * 24, b"GET / HTTP/1.1\r\n\r\n".ljust(40), b""):
            stranger = socket.create_connection(made.getsockname())
            stranger.sendall(greeting)
            if len(strangers) < 3:  # the last one says nothing, and waits
                stranger.shutdown(socket.SHUT_WR)
            strangers.append(stranger)
        return made

    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(connecting, "_listener", visited)
        made = make()
    assert isinstance(made, SocketCommunicator)
    assert works(made)
    made.close()
    return len(strangers)


def test_strangers_are_turned_away(ranks: Ranks) -> None:
    assert ranks.run(make_with_a_stranger, 3) == [4, 0, 0]


def ask_for_an_unknown_transport(rank: int, world_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRANSPORT, "pigeons")
        with pytest.raises(ValueError, match=r"RHTCOMM_TRANSPORT='pigeons' must be \"sockets\""):
            make()


def test_an_unknown_transport_is_refused(ranks: Ranks) -> None:
    ranks.run(ask_for_an_unknown_transport, 1)


# ---- Exchanges --------------------------------------------------------------------------------


def refuse_gaps(rank: int, world_size: int) -> None:
    made = TorchCommunicator.of_its_own(dist.group.WORLD, "cpu", SOON)
    for x in (torch.ones(10)[::2], torch.ones(4, 6)[:, :3]):
        with pytest.raises((ValueError, RuntimeError), match=r"contiguous|view size is not"):
            made.all_reduce_(x)
    assert works(made)
    made.close()


def test_a_tensor_with_gaps_is_refused(ranks: Ranks) -> None:
    """Rather than sent with what lies between."""
    ranks.run(refuse_gaps, 2)


def take_turns_on_two(rank: int, world_size: int) -> None:
    """Rank 0 sends much over one communicator, and goes on with another one."""
    one, other = (TorchCommunicator.of_its_own(dist.group.WORLD, "cpu", SOON) for _ in range(2))
    x = torch.full((30_000_000,), 7 * (1 - rank), dtype=torch.uint8)
    finish = one.start_broadcast(x)
    time.sleep(0.2 * rank)
    assert int(finish()[-1]) == 7
    assert works(other)
    collected = one.start_gather(x)
    time.sleep(0.2 * (1 - rank))
    collected()
    assert works(other)
    one.close()
    other.close()


def test_an_exchange_that_has_ended_has_nothing_left_to_send(ranks: Ranks) -> None:
    """Ranks of two levels would wait for each other, on one level each."""
    ranks.run(take_turns_on_two, 2)


def send_late(rank: int, world_size: int) -> float:
    """Rank 0 closes while the kernel still has most of a message; rank 1 takes it after that."""
    made = TorchCommunicator.of_its_own(dist.group.WORLD, "cpu", SOON)
    assert isinstance(made, SocketCommunicator)
    x = torch.zeros(1 << 20, dtype=torch.uint8)
    finish = made.start_broadcast(x)
    begin = time.monotonic()
    if rank == 1:
        time.sleep(1)
        finish()
    close, left = Connection.close, []

    def watched(one: Connection) -> None:
        left.append(one.undelivered)
        close(one)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "close", watched)
        made.close()
    assert left == [0]
    return time.monotonic() - begin


def test_a_rank_stays_until_the_others_have_what_it_sent(ranks: Ranks) -> None:
    """Where its network ends with it, nobody would deliver it."""
    ranks.run(send_late, 2)


# ---- When a rank fails ------------------------------------------------------------------------


def try_again(rank: int, world_size: int) -> list[str]:
    """Rank 0 gives up an exchange, and tries it again; rank 1 is late."""
    made = TorchCommunicator.of_its_own(dist.group.WORLD, "cpu", SOON)
    assert isinstance(made, SocketCommunicator)
    if rank == 0:
        made.timeout = timedelta(seconds=1)
    said, x = [], torch.full((1000,), 1.0 + rank)
    if rank == 1:
        time.sleep(1.5)
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            made.all_reduce_(x)
        said.append(str(error.value))
    return said


def test_an_exchange_that_failed_is_not_repeated(ranks: Ranks) -> None:
    """The late rank would take a part of the second try for one of the first."""
    first, second = ranks.run(try_again, 2)
    assert "Timed out" in first[0]
    assert re.search("Connection (closed|reset) by peer|Broken pipe", second[0])
    assert all("has closed its connections" in said[1] for said in (first, second))


def lose_one(rank: int, world_size: int, how: str) -> tuple[str, float]:
    """What rank 2 is told of rank 1, and after how long."""
    world = TorchCommunicator()
    made = TorchCommunicator.of_its_own(dist.group.WORLD, "cpu", SOON)
    assert isinstance(made, SocketCommunicator)
    if how == "silent":
        made.timeout = timedelta(seconds=2)
    x = torch.full((5_000_000,), rank, dtype=torch.uint8)
    if rank == 1 and how == "aborts":
        made.start_all_gather(x)
        made.abort()
    elif rank == 1 and how == "other call":
        with contextlib.suppress(RuntimeError):  # if the others have found out already
            made.start_all_gather(x[:-1])
    begin, message = time.monotonic(), ""
    if rank != 1:
        with pytest.raises(RuntimeError) as caught:
            made.all_gather(x)
        message = str(caught.value)
    seconds = time.monotonic() - begin
    world.all_gather(x[:1])  # rank 1 lives on for as long
    made.close()
    made.close()
    with pytest.raises(RuntimeError, match="closed its connections; restart"):
        made.all_gather(x)
    return message, seconds


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("aborts", "rank 1: (Connection closed by peer|.*[Rr]eset by peer|.*Broken pipe)"),
        ("silent", "Timed out: nothing came or left for 2 s while waiting for rank 1$"),
        ("other call", "rank 1 sent 4999999 bytes where 5000000 were expected"),
    ],
)
def test_the_others_hear_of_a_rank_that_fails(how: str, told: str, ranks: Ranks) -> None:
    first, _, third = ranks.run(lose_one, 3, how)
    assert any(re.search(told, message) for message, _ in (first, third))
    for message, seconds in (first, third):
        # The first to find out closes its connections, which the other may see earlier.
        assert re.search(f"{told}|rank [02]: .*({LOST_PEER})", message)
        assert (seconds >= 2) if how == "silent" else (seconds < SOON.total_seconds() / 2)
