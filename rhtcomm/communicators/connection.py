"""A TCP connection that the thread of its user drives: nothing moves between two calls."""

import contextlib
import os
import select
import socket
import sys
import weakref
from collections import deque
from itertools import islice

__all__ = ["Connection"]

_LENGTH_BYTES = 8
_PARTS = 32  # of messages in one system call

# Of an idle connection, after 60 s, then every 60 s; it ends if 10 get no answer. (Data on its way
# is sent again, on Linux for about 15 minutes.)
_PROBES = {
    "TCP_KEEPIDLE": 60,
    "TCP_KEEPINTVL": 60,
    "TCP_KEEPCNT": 10,
}


class Connection:
    """To one other rank, for messages that arrive in the order in which they were sent.

    Args:
        connected: a socket, which this object owns.
        peer: the other rank in words, for errors.
    """

    __slots__ = (
        "__weakref__",
        "_arriving",
        "_expected",
        "_length",
        "_process",
        "_read",
        "_sent",
        "_socket",
        "arrived",
        "leaving",
        "peer",
    )

    def __init__(self, connected: socket.socket, peer: str) -> None:
        self._socket, self.peer, self._process = connected, peer, os.getpid()
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Firewalls forget connections that are idle, and a machine may vanish without a word.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.leaving = deque[bytes | memoryview]()
        """What the kernel has not taken yet."""
        self._arriving = deque[tuple[memoryview, int]]()
        self._length, self._read = memoryview(bytearray(_LENGTH_BYTES)), 0  # of the next message
        self._expected = self.arrived = self._sent = 0
        """Numbers of messages."""
        _open.add(self)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def wants(self) -> int:
        """What to poll the socket for."""
        return (select.POLLOUT if self.leaving else 0) | (select.POLLIN if self._arriving else 0)

    def send(self, message: memoryview, length: int | None = None) -> int:
        """Send bytes, now or by a later `push`; they must not change until they have left.

        Args:
            message: the bytes, or one stripe of them.
            length: of all stripes, by which ranks that make different calls find out.

        Returns:
            The message's number.
        """
        length = len(message) if length is None else length
        self.leaving += (length.to_bytes(_LENGTH_BYTES, "little"), message)
        self._sent += 1
        self.push()
        return self._sent

    def has_left(self, number: int) -> bool:
        """Whether the kernel has all of a message that was sent."""
        return self._sent - (len(self.leaving) + 1) // 2 >= number

    def expect(self, message: memoryview, length: int | None = None) -> int:
        """Receive bytes by later calls of `pull`; as `send`."""
        self._arriving.append((message, len(message) if length is None else length))
        self._expected += 1
        return self._expected

    def push(self) -> None:
        """Give the kernel as much as it takes.

        Raises:
            RuntimeError: the other rank closed the connection.
        """
        leaving = self.leaving
        while leaving:
            try:
                # Without a signal, which ends programs that do not ignore it.
                sent = self._socket.sendmsg(islice(leaving, _PARTS), (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._lost(error) from error
            while leaving and sent >= len(leaving[0]):
                sent -= len(leaving.popleft())
            if sent:
                leaving[0] = leaving[0][sent:]

    def pull(self) -> None:
        """Take what the kernel has of the expected messages.

        Raises:
            RuntimeError: the other rank closed the connection, or sent a message of another length.
        """
        while self._arriving:
            (message, length), read = self._arriving[0], self._read
            try:
                if read < _LENGTH_BYTES:
                    read += self._socket.recvmsg_into([self._length[read:], message])[0]
                else:
                    read += self._socket.recv_into(message[read - _LENGTH_BYTES :])
            except BlockingIOError:
                return
            except OSError as error:
                raise self._lost(error) from error
            if read == self._read:
                raise self._lost("Connection closed by peer")
            self._read = read
            if read >= _LENGTH_BYTES:
                self._check_length(length)
            if read == _LENGTH_BYTES + len(message):
                self._arriving.popleft()
                self._read = 0
                self.arrived += 1

    def _check_length(self, expected: int) -> None:
        length = int.from_bytes(self._length, "little")
        if length != expected:
            raise RuntimeError(
                f"SocketCommunicator: {self.peer} sent {length} bytes where {expected} were "
                "expected: the ranks make different calls"
            )

    def _lost(self, why: object) -> RuntimeError:
        return RuntimeError(f"SocketCommunicator: {self.peer}: {why}")

    @property
    def undelivered(self) -> int:
        """Bytes that the kernel has taken, and the other rank's has not."""
        from fcntl import ioctl  # not on all systems
        from termios import TIOCOUTQ

        if self.fileno() < 0:  # it is closed
            return 0
        return int.from_bytes(ioctl(self._socket, TIOCOUTQ, bytes(4)), sys.byteorder)

    def close(self) -> None:
        """Close it for both sides; in a forked process, only the process's copy."""
        self.leaving.clear()
        self._arriving.clear()
        if os.getpid() == self._process:
            # A forked process that has a copy would keep it open.
            with contextlib.suppress(OSError):  # the other rank was first
                self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __del__(self) -> None:
        self._socket.close()


_open: weakref.WeakSet[Connection] = weakref.WeakSet()


def _close_copies() -> None:
    """In a forked process, such as one that loads data. While it had a copy, nobody would hear of
    the end of the process that it was forked from."""
    for connection in [*_open]:
        connection.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)
