"""Connects this rank with the others: it calls the lower ranks, and answers the higher ones."""

import contextlib
import errno
import os
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from functools import partial

from rhtcomm.communicators.interfaces import family_of

__all__ = ["TOKEN_BYTES", "call_and_answer"]

TOKEN_BYTES = 16
_CALLER = struct.Struct("<II")  # its rank, and the number of the connection
_GREETING_BYTES = TOKEN_BYTES + _CALLER.size

_Address = tuple[str, int]
_Which = tuple[int, int]  # the other rank, and the number of the connection


def call_and_answer(
    listener: socket.socket,
    token: bytes,
    rank: int,
    places: Sequence[_Address],
    count: int,
    seconds: float,
) -> dict[_Which, socket.socket]:
    """`count` connections to each other rank, by rank and number.

    A system keeps few callers waiting (somaxconn, often 128). So a rank answers while it calls, and
    callers that say nothing hold up nobody.

    Args:
        listener: where the higher ranks call.
        token: shows that a caller belongs to this group.
        places: where each rank listens.
        seconds: how long all of it may take.

    Raises:
        TimeoutError: a rank could not be reached in time, or did not call.
        OSError: a rank cannot be reached.
    """
    end = time.monotonic() + seconds
    calls = _Calls(listener, token, rank, len(places), count)
    with contextlib.closing(calls):
        for which in sorted(calls.missing):
            if which[0] < rank:
                calls.begin(which, places[which[0]])
        while calls.missing:
            left = end - time.monotonic()
            if left <= 0 or not calls.proceed(left):
                ranks = ", ".join(str(other) for other in sorted({one for one, _ in calls.missing}))
                raise TimeoutError(f"no connection to rank {ranks} within {seconds:g} s")
        return calls.take()


class _Calls:
    """Calls and callers in progress; what each socket waits for is in the selector."""

    def __init__(
        self, listener: socket.socket, token: bytes, rank: int, world_size: int, count: int
    ) -> None:
        self._listener, self._token, self._rank = listener, token, rank
        others = (other for other in range(world_size) if other != rank)
        self.missing = {(other, number) for other in others for number in range(count)}
        self._found: dict[_Which, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def begin(self, which: _Which, place: _Address) -> None:
        called = socket.socket(family_of(place[0]))
        greet = partial(self._greet, called, which)
        self._selector.register(called, selectors.EVENT_WRITE, greet)  # once it is connected
        called.setblocking(False)
        _check(called.connect_ex(place), which)

    def proceed(self, seconds: float) -> bool:
        """Wait until something can go on, and let it; whether there was anything."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            key.data()
        return bool(ready)

    def _greet(self, called: socket.socket, which: _Which) -> None:
        _check(called.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), which)
        called.sendall(self._token + _CALLER.pack(self._rank, which[1]))
        self._keep(called, which)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            caller, _ = self._listener.accept()
            caller.setblocking(False)
            self._selector.register(caller, selectors.EVENT_READ, partial(self._hear, caller, b""))

    def _hear(self, caller: socket.socket, before: bytes) -> None:
        more = b""
        with contextlib.suppress(OSError):
            more = caller.recv(_GREETING_BYTES - len(before))
        heard = before + more
        if more and self._token.startswith(heard[:TOKEN_BYTES]):
            if len(heard) < _GREETING_BYTES:
                again = partial(self._hear, caller, heard)
                self._selector.modify(caller, selectors.EVENT_READ, again)
                return
            which = _CALLER.unpack(heard[TOKEN_BYTES:])
            if which in self.missing and which[0] > self._rank:
                self._keep(caller, which)
                return
        self._selector.unregister(caller)
        caller.close()

    def _keep(self, one: socket.socket, which: _Which) -> None:
        self._selector.unregister(one)
        self._found[which] = one
        self.missing.remove(which)

    def take(self) -> dict[_Which, socket.socket]:
        found, self._found = self._found, {}
        return found

    def close(self) -> None:
        """Close all sockets but the listener and those that were taken."""
        registered = [key.fileobj for key in self._selector.get_map().values()]
        self._selector.close()
        for one in (*registered, *self._found.values()):
            if one is not self._listener:
                assert isinstance(one, socket.socket)
                one.close()


def _check(error: int, which: _Which) -> None:
    """Raise OSError for the error of a call, unless it has only begun."""
    if error not in (0, errno.EINPROGRESS):
        raise OSError(error, f"rank {which[0]}: {os.strerror(error)}")
