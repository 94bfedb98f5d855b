"""Private connections by sockets: how they are made, and what ranks hear when one fails."""

import logging
import os
import re
import signal
import socket
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from states import SOON

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


def take_one(connection: Connection) -> None:
    while not connection.arrived:
        connection.pull()


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


def test_closing_ends_it_although_a_forked_process_has_a_copy() -> None:
    here, there = connected()
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    here.close()
    there.expect(memoryview(bytearray(4)))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        there.pull()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


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
    """Rank 1 cannot or must not connect by sockets."""
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
        patch.setattr(socket, "create_connection", broken)
    else:
        patch.setattr(connecting, "_read_greeting", broken)


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
        for greeting in (b"", b"\0" * 24, b"GET / HTTP/1.1\r\n\r\n".ljust(40)):
            stranger = socket.create_connection(made.getsockname())
            stranger.sendall(greeting)
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
    assert ranks.run(make_with_a_stranger, 3) == [3, 0, 0]


def ask_for_an_unknown_transport(rank: int, world_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRANSPORT, "pigeons")
        with pytest.raises(ValueError, match=r"RHTCOMM_TRANSPORT='pigeons' must be \"sockets\""):
            make()


def test_an_unknown_transport_is_refused(ranks: Ranks) -> None:
    ranks.run(ask_for_an_unknown_transport, 1)


# ---- Exchanges --------------------------------------------------------------------------------


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


# ---- When a rank fails ------------------------------------------------------------------------


def lose_one(rank: int, world_size: int, how: str) -> tuple[str, float]:
    """What rank 2 is told of rank 1, and after how long."""
    world = TorchCommunicator()
    timeout = timedelta(seconds=2) if how == "silent" else SOON
    made = TorchCommunicator.of_its_own(dist.group.WORLD, "cpu", timeout)
    assert isinstance(made, SocketCommunicator)
    x = torch.full((5_000_000,), rank, dtype=torch.uint8)
    if rank == 1 and how == "aborts":
        made.start_all_gather(x)
        made.abort()
    elif rank == 1 and how == "other call":
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
    for message, seconds in (first, third):
        assert re.search(told, message)
        assert (seconds >= 2) if how == "silent" else (seconds < SOON.total_seconds() / 2)
