"""Exchanges over TCP connections of their own, one or several to each other rank.

The thread that needs an exchange drives the connections itself, so no other thread takes a core
from it, and a message costs two system calls. While it computes, what the kernel's buffers hold
is sent on. Each message follows its length, so ranks that make different calls find out at once.
"""

import select
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Literal, TypeVar

import torch

from rhtcomm.communicators.base import Communicator, name_of
from rhtcomm.communicators.connection import Connection
from rhtcomm.communicators.stripes import cut
from rhtcomm.memory import bytes_of

__all__ = ["SocketCommunicator"]

_PIECE = 1 << 22  # bytes of a sum on their way at once
_LONGEST = (1 << 31) - 1  # milliseconds that the system can wait
_DELIVERY = 5.0  # seconds to wait at the end

Result = TypeVar("Result")
_Rows = Sequence[torch.Tensor]  # by rank
_Messages = Sequence[memoryview]  # by rank


class SocketCommunicator(Communicator):
    """Exchanges of tensors in host memory over connections that nobody else uses.

    Args:
        rank: of this process among those that are connected.
        ranks: their world ranks.
        opened: connections to the others, by rank; closed by `close`. Long messages are striped
            over them.
        timeout: how long to wait while nothing arrives and nothing leaves.
        connections: how many this rank was asked for, which ranks compare.
    """

    private = True

    def __init__(
        self,
        rank: int,
        ranks: Sequence[int],
        opened: Mapping[int, Sequence[Connection]],
        timeout: timedelta,
        connections: int = 1,
    ) -> None:
        self.timeout, self.bytes_sent, self.connections = timeout, 0, connections
        self._rank, self._ranks = rank, list(ranks)
        world_size = len(self._ranks)
        # Each rank begins with its neighbour, so that no rank receives from all others first.
        self._others = [(rank + i) % world_size for i in range(1, world_size)]
        self._opened = dict(opened)
        self._connections = [one for several in opened.values() for one in several]

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return len(self._ranks)

    @property
    def ranks(self) -> list[int]:
        """World ranks, in the order of the group."""
        return list(self._ranks)

    def name_of(self, rank: int) -> str:
        return name_of(rank, self._ranks)

    @property
    def patience(self) -> str:
        return f"its timeout of {self.timeout.total_seconds():g} s"

    def greet(self) -> None:
        """Return when all ranks call it, so that nobody leaves while others still connect.

        Raises:
            RuntimeError: a rank left.
        """
        try:
            self.all_gather(torch.zeros(1, dtype=torch.uint8, device="cpu"))
        except BaseException:
            self.abort()
            raise
        self.bytes_sent = 0

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.bytes_sent += (self.world_size - 1) * x.numel()
        gathered = x.new_empty(self.world_size, x.numel())
        mine, incoming = _message_of(x), _rows_of(gathered)
        incoming[self._rank][:] = mine
        return self._swap([mine] * self.world_size, incoming, gathered)

    def start_all_to_all(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        x = x.contiguous()
        self.bytes_sent += (self.world_size - 1) * x.shape[1]
        received = torch.empty_like(x)
        outgoing, incoming = _rows_of(x), _rows_of(received)
        incoming[self._rank][:] = outgoing[self._rank]
        return self._swap(outgoing, incoming, received)

    def start_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        if self._rank > 0:
            self.bytes_sent += x.numel()
            return self._end_of([], self._send([_message_of(x)], [0]), None)
        gathered = x.new_empty(self.world_size, x.numel())
        incoming = _rows_of(gathered)
        incoming[0][:] = _message_of(x)
        return self._end_of(self._expect(incoming, self._others), [], gathered)

    def start_broadcast(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        if self._rank > 0:
            return self._end_of(self._expect([_message_of(x)], [0]), [], x)
        self.bytes_sent += (self.world_size - 1) * x.numel()
        return self._end_of([], self._send([_message_of(x)] * self.world_size, self._others), x)

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        self.start_all_reduce(x, op)()

    def start_all_reduce(
        self, x: torch.Tensor, op: Literal["sum", "max"] = "sum"
    ) -> Callable[[], torch.Tensor]:
        self.bytes_sent += self.ring_bytes(x.nbytes)
        if self.world_size == 1:
            return lambda: x
        first, *others = x.detach().view(-1).split(max(1, _PIECE // x.itemsize))
        begun = self._start_shards(first)

        def finish() -> torch.Tensor:
            # Each rank adds up its shard of a piece and sends it to the others, while shards of the
            # next piece are on their way.
            ahead, finishing = begun, []
            for following in (*others, None):
                shards, finish_shards = ahead
                if following is not None:
                    ahead = self._start_shards(following)
                mine = shards[self._rank]
                _add_up(finish_shards(), op, out=mine)
                messages = [_message_of(mine)] * self.world_size
                finishing.append(self._swap(messages, [*map(_message_of, shards)], None))
            for finish_sum in finishing:
                finish_sum()
            return x

        return finish

    def _start_shards(self, piece: torch.Tensor) -> tuple[_Rows, Callable[[], _Rows]]:
        """The shards of a piece, and a function that waits for this rank's shard of all ranks."""
        shards = piece.tensor_split(self.world_size)
        mine = shards[self._rank]
        rows = [
            mine if rank == self._rank else torch.empty_like(mine)
            for rank in range(self.world_size)
        ]
        outgoing, incoming = [*map(_message_of, shards)], [*map(_message_of, rows)]
        return shards, self._swap(outgoing, incoming, rows)

    def _swap(
        self, outgoing: _Messages, incoming: _Messages, result: Result
    ) -> Callable[[], Result]:
        """Send outgoing[i] to rank i, and receive incoming[i] from it."""
        arriving = self._expect(incoming, self._others)
        return self._end_of(arriving, self._send(outgoing, self._others), result)

    def _send(self, messages: _Messages, ranks: Sequence[int]) -> list[tuple[Connection, int]]:
        """Send messages[i] to rank i; returns the numbers of those that have not left."""
        leaving = []
        try:
            for connection, stripe, length in self._stripes(messages, ranks):
                number = connection.send(stripe, length)
                if connection.leaving:
                    leaving.append((connection, number))
        except BaseException:
            self.abort()
            raise
        return leaving

    def _expect(self, messages: _Messages, ranks: Sequence[int]) -> list[tuple[Connection, int]]:
        """Receive messages[i] from rank i; returns their numbers."""
        return [
            (connection, connection.expect(stripe, length))
            for connection, stripe, length in self._stripes(messages, ranks)
        ]

    def _stripes(
        self, messages: _Messages, ranks: Sequence[int]
    ) -> list[tuple[Connection, memoryview, int]]:
        """Connections, the parts of messages to or from ranks that they carry, and the lengths of
        the messages."""
        if ranks and not self._connections:
            raise self._closed()
        return [
            (connection, stripe, len(messages[rank]))
            for rank in ranks
            for connection, stripe in zip(
                self._opened[rank], cut(messages[rank], len(self._opened[rank])), strict=False
            )
        ]

    def _end_of(
        self,
        arriving: list[tuple[Connection, int]],
        leaving: list[tuple[Connection, int]],
        result: Result,
    ) -> Callable[[], Result]:
        """A function that waits for messages to arrive and to leave.

        Nothing is sent on between two calls of this communicator. If an exchange ended with a part
        of its messages still here, the others might wait for that part for ever, and this rank for
        them elsewhere. What has left, the kernel delivers (see `close`), so there is nothing to
        `settle`.

        After an error messages are left, which the other ranks' next exchange would take for its
        own. So the connections are closed then.
        """

        def finish() -> Result:
            try:
                for connection, _ in leaving:
                    connection.push()
                for connection, number in arriving:
                    if connection.arrived < number:
                        connection.pull()
                    while connection.arrived < number:
                        self._wait()
                for connection, number in leaving:
                    while not connection.has_left(number):
                        self._wait()
            except BaseException:
                self.abort()
                raise
            return result

        return finish

    def _wait(self) -> None:
        """Wait until something can be sent or received, and do so.

        Raises:
            RuntimeError: another rank closed its connection, or made a different call, or nothing
                came or left for the timeout.
        """
        poll, waiting = select.poll(), {}
        for connection in self._connections:
            if wanted := connection.wants:
                number = connection.fileno()
                waiting[number] = connection
                poll.register(number, wanted)
        if not waiting:
            raise self._closed()
        ready = poll.poll(min(_LONGEST, 1000 * self.timeout.total_seconds()))
        if not ready:
            raise RuntimeError(
                "SocketCommunicator: Timed out: nothing came or left for "
                f"{self.timeout.total_seconds():g} s while waiting for "
                + ", ".join(dict.fromkeys(connection.peer for connection in waiting.values()))
            )
        for number, _ in ready:
            waiting[number].push()
            waiting[number].pull()

    def _closed(self) -> RuntimeError:
        return RuntimeError(
            f"SocketCommunicator: {self.name_of(self.rank)} of {self.world_size} has closed its "
            "connections; restart the program"
        )

    def abort(self) -> None:
        """Close the connections; the other ranks then raise."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def close(self) -> None:
        """Close the connections, once the others have what was sent, or after some seconds.

        The kernel would deliver it later, but not where the network ends with this process, as in a
        container.
        """
        end = time.monotonic() + _DELIVERY
        while any(one.undelivered for one in self._connections) and time.monotonic() < end:
            time.sleep(0.001)
        self.abort()


def _add_up(rows: _Rows, op: Literal["sum", "max"], out: torch.Tensor) -> None:
    """In the order of the ranks; `out` may be one of two or more rows."""
    combine = torch.add if op == "sum" else torch.maximum
    total, *between, last = rows
    for row in between:
        total = combine(total, row)
    combine(total, last, out=out)


def _message_of(x: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in its own memory."""
    return bytes_of(x).data


def _rows_of(x: torch.Tensor) -> _Messages:
    """The bytes of the rows of x (n, m) uint8; a slice of bytes costs much less than one of x."""
    whole, (count, length) = _message_of(x), x.shape
    return [whole[i * length : (i + 1) * length] for i in range(count)]
