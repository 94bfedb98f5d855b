"""Who sends by a process group or another thing that carries messages."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

from rhtcomm.communicators.base import Topology

__all__ = ["Users", "users"]


class Users:
    """Who may send over what carries messages: one user at a time, numbered alike on all ranks.

    Two users of one process group whose exchanges are in flight at once would get each other's
    messages, and nothing in a message that is not compressed tells whose it is. So the second one
    is refused; and payloads carry the number of their user (`Key.owner`), which ranks compare once.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held by whoever decides by who sends now.

        The garbage collector may interrupt a thread that holds it, and give something back.
        """
        self._numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._using: weakref.WeakKeyDictionary[object, weakref.ref[object]]
        self._using = weakref.WeakKeyDictionary()

    def number(self, carriers: list[object]) -> int:
        """0 for the first user of what carries a communicator's messages, and so on."""
        with self.lock:
            number = max(self._numbers.get(carrier, 0) for carrier in carriers)
            for carrier in carriers:
                self._numbers[carrier] = number + 1
        return number

    def take(self, carriers: list[object], user: object) -> None:
        """Let `user` send over them until `give_back`.

        Raises:
            RuntimeError: somebody else does.
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
        """Take what carries a topology's messages for a while, unless `user` has it already."""
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
