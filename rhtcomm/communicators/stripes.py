"""Several connections to each other rank: long messages are cut into stripes, one for each.

Loss and a long way limit the speed of a single TCP connection. When a packet is lost, TCP lowers
its rate, and needs many round trips to recover; when a connection starts, or was idle, it needs
some until it is fast. Each connection does so for itself.
"""

from collections.abc import Sequence

from rhtcomm.arguments import integer

__all__ = ["check_connections", "check_stripes", "cut"]

_MOST = 64  # connections to each other rank
_SHORTEST = 1 << 14  # bytes; TCP begins with about as many before it waits for an answer


def cut(message: memoryview, connections: int) -> Sequence[memoryview]:
    """The stripes of a message of bytes, in the order of the connections that carry them."""
    if connections == 1 or len(message) < 2 * _SHORTEST:
        return (message,)
    count = min(connections, len(message) // _SHORTEST)
    length = -(-len(message) // count)
    return [message[offset : offset + length] for offset in range(0, len(message), length)]


def check_connections(connections: object, owner: str) -> int:
    """The number of connections to each other rank, as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is not from 1 to 64.
    """
    found = integer(connections, owner, "connections")
    if not 1 <= found <= _MOST:
        raise ValueError(f"{owner}: connections={found} must be from 1 to {_MOST}")
    return found


def check_stripes(connections: int, carrier: str, device: str) -> None:
    """Raise ValueError if there can be only one connection: only sockets can be several.

    Args:
        connections: how many were asked for.
        carrier: what carries messages, such as the backend "gloo", which gives way to sockets.
        device: kind of the device that tensors are on.
    """
    if connections > 1 and (carrier, device) != ("gloo", "cpu"):
        raise ValueError(
            f"rhtcomm: connections={connections} is for CPU tensors over sockets, in Gloo's place, "
            f"but this is for {device} tensors over {carrier}; leave it out (NCCL has "
            "NCCL_SOCKET_NTHREADS and NCCL_NSOCKS_PERTHREAD instead)"
        )
