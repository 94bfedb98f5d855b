"""Which user may send over a process group or another carrier of messages."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

from rhtcomm.communicators.base import Topology

__all__ = ["Users", "users"]


class Users:
    """Which user may use a carrier: one at a time, with the same number on all ranks.

    If two users of one process group had exchanges in flight at once, they would receive each
    other's messages, and uncompressed messages do not say whose they are. So the second user is
    refused. Payloads carry the number of their user (`Key.owner`), which ranks compare once.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while reading or changing who sends now.

        Reentrant: the garbage collector may interrupt a thread that holds it, and call `give_back`.
        """
        self._numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._using: weakref.WeakKeyDictionary[object, weakref.ref[object]]
        self._using = weakref.WeakKeyDictionary()

    def number(self, carriers: list[object]) -> int:
        """The number of a new user of a communicator's carriers: 0 for the first, and so on."""
        with self.lock:
            number = max(self._numbers.get(carrier, 0) for carrier in carriers)
            for carrier in carriers:
                self._numbers[carrier] = number + 1
        return number

    def take(self, carriers: list[object], user: object) -> None:
        """Let `user` send over the carriers until `give_back`.

        Raises:
            RuntimeError: another user is sending.
        """
        with self.lock:
            for carrier in carriers:
                other = self._using[carrier]() if carrier in self._using else None
                if other is not None and other is not user:
                    raise RuntimeError(
                        f"rhtcomm: {user} cannot use {carrier} while {other} is using it, since "
                        "their messages would be mixed up; give each a communicator over its own "
                        "group (torch.distributed.new_group()), or let one wait for the other"
                    )
            for carrier in carriers:
                self._using[carrier] = weakref.ref(user)

    @contextlib.contextmanager
    def using(self, topology: Topology, user: object) -> Iterator[None]:
        """Hold a topology's carriers for a while, unless `user` already does."""
        carriers = [] if topology.private else topology.carriers()
        with self.lock:
            users = [self._using[carrier]() for carrier in carriers if carrier in self._using]
        had = len(users) == len(carriers) and all(other is user for other in users)
        self.take(carriers, user)
        try:
            yield
        finally:
            if not had:
                self.give_back(user)

    def give_back(self, user: object) -> None:
        with self.lock:
            for carrier in [c for c, other in self._using.items() if other() is user]:
                del self._using[carrier]


users = Users()
