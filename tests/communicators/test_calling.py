"""How ranks open their connections: all at once, and in spite of strangers."""

import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
from harness import limit

from rhtcomm.communicators.calling import TOKEN_BYTES, call_and_answer

TOKEN = bytes(range(TOKEN_BYTES))
SOON = limit(20)

Found = dict[tuple[int, int], socket.socket]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listeners(
    opened: ExitStack, count: int, host: str = "127.0.0.1", waiting: int = 50
) -> tuple[list[socket.socket], list[tuple[str, int]]]:
    """They, and their addresses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = []
    for _ in range(count):
        one = opened.enter_context(socket.socket(family))
        one.bind((host, 0))
        one.listen(waiting)
        made.append(one)
    return made, [one.getsockname()[:2] for one in made]


def connect(opened: ExitStack, world_size: int, count: int, **options: Any) -> list[Found]:
    """The connections of all ranks, each made by a thread."""
    made, places = listeners(opened, world_size, **options)
    with ThreadPoolExecutor(world_size) as threads:
        futures = [
            threads.submit(call_and_answer, one, TOKEN, rank, places, count, SOON)
            for rank, one in enumerate(made)
        ]
        return results(opened, *futures)


def results(opened: ExitStack, *futures: "Future[Found]") -> list[Found]:
    found = [future.result() for future in futures]
    for connections in found:
        for one in connections.values():
            opened.enter_context(one)
    return found


def check(found: list[Found], count: int) -> None:
    """Both ends of each connection know the same rank and number."""
    everybody = range(len(found))
    for rank in everybody:
        others = {(other, number) for other in everybody for number in range(count)}
        assert found[rank].keys() == {which for which in others if which[0] != rank}
        for (other, number), one in found[rank].items():
            assert one.getpeername() == found[other][rank, number].getsockname()


@pytest.mark.parametrize(("world_size", "count"), [(1, 2), (2, 1), (4, 3)])
def test_every_rank_reaches_every_other(world_size: int, count: int, opened: ExitStack) -> None:
    check(connect(opened, world_size, count), count)


def test_ranks_of_ipv6(opened: ExitStack) -> None:
    try:
        found = connect(opened, 3, 2, host="::1")
    except OSError as error:
        pytest.skip(f"no IPv6: {error}")
    check(found, 2)


def test_few_callers_may_wait_at_a_time(opened: ExitStack) -> None:
    """As systems limit it: a rank that called first and answered later would wait for itself."""
    check(connect(opened, 3, 8, waiting=2), 8)


def test_callers_that_say_nothing_hold_up_nobody(opened: ExitStack) -> None:
    made, places = listeners(opened, 2)
    for _ in range(3):
        opened.enter_context(closing(socket.create_connection(places[0])))
    begin = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        futures = [
            threads.submit(call_and_answer, made[rank], TOKEN, rank, places, 1, SOON)
            for rank in range(2)
        ]
        check(results(opened, *futures), 1)
    assert time.monotonic() - begin < SOON / 2


@pytest.mark.parametrize(
    "greeting",
    [
        *(b"", b"GET / HTTP/1.1\r\n\r\n".ljust(40), bytes(24), TOKEN[:-1] + b"\0" + bytes(8)),
        # With the token, but not a connection that is missing: itself, nobody, the ninth.
        *(TOKEN + struct.pack("<II", *which) for which in ((0, 0), (65536, 0), (1, 8))),
    ],
)
def test_others_are_turned_away(greeting: bytes, opened: ExitStack) -> None:
    made, places = listeners(opened, 2)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(call_and_answer, made[0], TOKEN, 0, places, 1, SOON)
        stranger = opened.enter_context(closing(socket.create_connection(places[0])))
        stranger.sendall(greeting)
        stranger.settimeout(SOON)
        with suppress(ConnectionError):  # if something was left unread
            with suppress(OSError):  # if it is turned away already
                stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
        second = threads.submit(call_and_answer, made[1], TOKEN, 1, places, 1, SOON)
        check(results(opened, first, second), 1)


def test_a_connection_that_is_there_is_not_replaced(opened: ExitStack) -> None:
    made, places = listeners(opened, 3)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(call_and_answer, made[0], TOKEN, 0, places, 1, SOON)
        second = threads.submit(call_and_answer, made[1], TOKEN, 1, places, 1, SOON)
        time.sleep(0.2)
        again = opened.enter_context(closing(socket.create_connection(places[0])))
        again.sendall(TOKEN + struct.pack("<II", 1, 0))
        again.settimeout(SOON)
        assert again.recv(1) == b""
        third = threads.submit(call_and_answer, made[2], TOKEN, 2, places, 1, SOON)
        check(results(opened, first, second, third), 1)


def test_a_rank_that_does_not_come_is_named(opened: ExitStack) -> None:
    made, places = listeners(opened, 4)
    with pytest.raises(TimeoutError, match=r"no connection to rank 2, 3 within 0\.2 s"):
        call_and_answer(made[1], TOKEN, 1, places, 2, 0.2)
    gone = made.pop(0)
    gone.close()
    with pytest.raises(ConnectionRefusedError, match="rank 0: Connection refused"):
        call_and_answer(made[0], TOKEN, 1, places, 2, SOON)


def test_nothing_stays_open_after_an_error(opened: ExitStack) -> None:
    made, places = listeners(opened, 3)
    stranger = opened.enter_context(closing(socket.create_connection(places[1])))
    with pytest.raises(TimeoutError):
        call_and_answer(made[1], TOKEN, 1, places, 1, 0.2)
    stranger.settimeout(SOON)
    assert stranger.recv(1) == b""
    called, _ = made[0].accept()
    with called:
        called.settimeout(SOON)
        heard = b""
        while more := called.recv(100):
            heard += more
        assert heard == TOKEN + struct.pack("<II", 1, 0)
    assert made[1].fileno() >= 0, "the listener belongs to the caller"
