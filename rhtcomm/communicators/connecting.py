"""Opens TCP connections between any two ranks of a process group."""

import contextlib
import itertools
import logging
import os
import secrets
import select
import socket
import struct
import sys
from collections.abc import Callable

import torch.distributed as dist

from rhtcomm.communicators.interfaces import chosen_by_gloo, family_of, interfaces
from rhtcomm.communicators.meeting import FACT_BYTES, Meeting

__all__ = ["TRANSPORT", "check_transport", "open_sockets"]

TRANSPORT = "RHTCOMM_TRANSPORT"
"""Environment variable: "sockets" (the default), or "gloo" for private connections by Gloo."""
_SECONDS = 10.0  # to connect, and to hear from a rank that has connected
_STRANGERS = 64  # that may call before the other ranks do
_TOKEN_BYTES = 16
_CALLER = struct.Struct("<II")  # its rank, and the number of the connection
_DONE, _FAILED, _REFUSED = b"+", b"!", b"-"  # how what a rank tells of a step begins

_log = logging.getLogger("rhtcomm")


class _Refused(Exception):
    """This rank must not use sockets, or its system cannot."""


def check_transport() -> None:
    """Raise ValueError if RHTCOMM_TRANSPORT is neither "sockets" nor "gloo"."""
    wanted = os.environ.get(TRANSPORT, "sockets")
    if wanted not in ("sockets", "gloo"):
        raise ValueError(f'{TRANSPORT}={wanted!r} must be "sockets" or "gloo"')


def open_sockets(
    parent: dist.ProcessGroup, meeting: Meeting, connections: int = 1
) -> dict[int, list[socket.socket]] | None:
    """Connected sockets to each other rank of `parent`, by rank; all of them must call it.

    There are `connections` of them, or one if ranks differ in that. Ranks listen where Gloo would.
    None, on all ranks, if one of them cannot connect or must not; the log says why.

    Raises:
        RuntimeError: a rank died or left, or did not answer in time.
    """
    rank, world_size = parent.rank(), parent.size()
    found: dict[tuple[int, int], socket.socket] = {}  # by rank and number
    with contextlib.ExitStack() as opened:
        listening: list[socket.socket] = []

        def listen() -> bytes:
            listening.append(opened.enter_context(_listener(world_size * connections)))
            host, port, *_ = listening[0].getsockname()
            return secrets.token_bytes(_TOKEN_BYTES) + f"{host} {port} {connections}".encode()

        told = _take_step(meeting, listen)
        if told is None:
            return None
        token = told[0][:_TOKEN_BYTES]  # proves to a listener that a rank of this group calls
        places = [text[_TOKEN_BYTES:].decode().split() for text in told]
        count = connections if len({place[2] for place in places}) == 1 else 1

        def call() -> bytes:
            for other, number in itertools.product(range(rank), range(count)):
                address = places[other][0], int(places[other][1])
                called = opened.enter_context(socket.create_connection(address, _SECONDS))
                called.sendall(token + _CALLER.pack(rank, number))
                found[other, number] = called
            return b""

        def accept() -> bytes:
            listening[0].settimeout(_SECONDS)
            while len(found) < count * (world_size - 1):
                caller, _ = listening[0].accept()
                greeting = _read_greeting(caller)
                if not greeting.startswith(token):
                    caller.close()
                    continue
                which = _CALLER.unpack(greeting[_TOKEN_BYTES:])
                found[which] = opened.enter_context(caller)
            return b""

        # The system completes a call before the listener accepts it, so no rank waits for another.
        if _take_step(meeting, call) is None or _take_step(meeting, accept) is None:
            return None
        opened.pop_all()
        listening[0].close()
    others = sorted({other for other, _ in found})
    return {other: [found[other, number] for number in range(count)] for other in others}


def _take_step(meeting: Meeting, step: Callable[[], bytes]) -> list[bytes] | None:
    """What it returned on each rank; None, on all ranks, if it failed on one of them."""
    try:
        mine = _DONE + step()
    except _Refused as reason:
        mine = _REFUSED + str(reason).encode()
    except OSError as error:
        mine = _FAILED + str(error).encode()
    told = meeting.tell(mine[:FACT_BYTES])
    for rank, text in enumerate(told):
        if not text.startswith(_DONE):
            level = logging.WARNING if text.startswith(_FAILED) else logging.INFO
            why = text[1:].decode(errors="replace")
            _log.log(level, "rhtcomm: connections go through Gloo, since on rank %d %s", rank, why)
            return None
    return [text[1:] for text in told]


def _listener(callers: int) -> socket.socket:
    """A socket that listens at the address that Gloo takes."""
    if os.environ.get(TRANSPORT) == "gloo":
        raise _Refused(f"{TRANSPORT} is gloo")
    if os.environ.get("GLOO_DEVICE_TRANSPORT", "TCP") != "TCP":  # such as TLS
        raise _Refused("GLOO_DEVICE_TRANSPORT is not TCP")
    if sys.platform != "linux" or not hasattr(select, "poll"):
        raise _Refused("the system is not Linux")
    address, why = chosen_by_gloo(interfaces())
    if not address:
        raise _Refused(f"no interface has an address: {why}")
    listener = socket.socket(family_of(address))
    try:
        listener.bind((address, 0))
        listener.listen(callers + _STRANGERS)
    except OSError:
        listener.close()
        raise
    return listener


def _read_greeting(caller: socket.socket) -> bytes:
    """What a caller says first; less if it does not say all of it."""
    caller.settimeout(_SECONDS)
    greeting = b""
    with contextlib.suppress(OSError):
        while more := caller.recv(_TOKEN_BYTES + _CALLER.size - len(greeting)):
            greeting += more
            if len(greeting) == _TOKEN_BYTES + _CALLER.size:
                break
    return greeting if len(greeting) == _TOKEN_BYTES + _CALLER.size else b""
