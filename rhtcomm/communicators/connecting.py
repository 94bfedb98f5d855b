"""Opens TCP connections between any two ranks of a process group."""

import contextlib
import logging
import os
import secrets
import select
import socket
import sys
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from rhtcomm.communicators.calling import TOKEN_BYTES, call_and_answer
from rhtcomm.communicators.interfaces import chosen_by_gloo, family_of, interfaces
from rhtcomm.communicators.meeting import FACT_BYTES, Meeting

__all__ = ["TRANSPORT", "check_transport", "open_sockets"]

TRANSPORT = "RHTCOMM_TRANSPORT"
"""Environment variable: "sockets" (the default), or "gloo" for private connections by Gloo."""
_SECONDS = 10.0  # to connect all ranks
_STRANGERS = 64  # that may call before the other ranks do
_DONE, _REFUSED, _FAILED, _LATE = b"+", b"-", b"!", b"?"  # how what a rank tells of a step begins

_log = logging.getLogger("rhtcomm")


class _Refused(Exception):
    """This rank must not use sockets, or its system cannot."""


def check_transport() -> None:
    """Raise ValueError if RHTCOMM_TRANSPORT is neither "sockets" nor "gloo"."""
    wanted = os.environ.get(TRANSPORT, "sockets")
    if wanted not in ("sockets", "gloo"):
        raise ValueError(f'{TRANSPORT}={wanted!r} must be "sockets" or "gloo"')


def open_sockets(
    parent: dist.ProcessGroup, meeting: Meeting, timeout: timedelta, connections: int = 1
) -> dict[int, list[socket.socket]] | str:
    """Connected sockets to each other rank of `parent`, by rank; all of them must call it.

    There are `connections` of them, or one if ranks differ in that. Ranks listen where Gloo would.
    If one of them cannot connect or must not, all return the reason, and log it.

    Raises:
        RuntimeError: a rank died or left, or did not answer in time.
    """
    with contextlib.ExitStack() as opened:
        listening: list[socket.socket] = []

        def listen() -> bytes:
            listening.append(opened.enter_context(_listener(parent.size() * connections)))
            host, port, *_ = listening[0].getsockname()
            return secrets.token_bytes(TOKEN_BYTES) + f"{host} {port} {connections}".encode()

        told = _take_step(meeting, listen)
        if isinstance(told, str):
            return told
        token = told[0][:TOKEN_BYTES]
        texts = [text[TOKEN_BYTES:].decode().split() for text in told]
        places = [(host, int(port)) for host, port, _ in texts]
        count = connections if len({number for *_, number in texts}) == 1 else 1
        found: dict[tuple[int, int], socket.socket] = {}  # by rank and number

        def connect() -> bytes:
            seconds = min(_SECONDS, timeout.total_seconds() / 2)  # the others wait for `timeout`
            made = call_and_answer(listening[0], token, parent.rank(), places, count, seconds)
            for one in made.values():
                opened.enter_context(one)
            found.update(made)
            return b""

        told = _take_step(meeting, connect)
        if isinstance(told, str):
            return told
        opened.pop_all()
        listening[0].close()
    others = sorted({other for other, _ in found})
    return {other: [found[other, number] for number in range(count)] for other in others}


def _take_step(meeting: Meeting, step: Callable[[], bytes]) -> list[bytes] | str:
    """What it returned on each rank; if it failed on one of them, the reason, on all ranks."""
    try:
        mine = _DONE + step()
    except _Refused as reason:
        mine = _REFUSED + str(reason).encode()
    except TimeoutError as error:
        mine = _LATE + str(error).encode()
    except OSError as error:
        mine = _FAILED + str(error).encode()
    told = meeting.tell(mine[:FACT_BYTES])
    # Where a rank cannot be reached, others wait in vain.
    for kind in (_REFUSED, _FAILED, _LATE):
        for rank, text in enumerate(told):
            if text.startswith(kind):
                why = f"on {meeting.name_of(rank)} {text[1:].decode(errors='replace')}"
                level = logging.INFO if kind == _REFUSED else logging.WARNING
                _log.log(level, "rhtcomm: connections go through Gloo, since %s", why)
                return why
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
