"""Exchanges over a process group of torch.distributed."""

import socket
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import default_pg_timeout

from rhtcomm.communicators import gloo
from rhtcomm.communicators.base import Communicator, name_of
from rhtcomm.communicators.connecting import check_transport, open_sockets
from rhtcomm.communicators.connection import Connection
from rhtcomm.communicators.groups import backend_of, backends_of, destroy, timeout_of
from rhtcomm.communicators.meeting import Meeting
from rhtcomm.communicators.sockets import SocketCommunicator
from rhtcomm.communicators.stripes import check_connections, check_stripes

__all__ = ["TorchCommunicator", "backend_of"]

# Tags for messages on a process group that others may use too; messages with one tag stay in order.
# Acknowledgements have their own tag: received in place of a longer message, one would end the
# process.
_TAG, _ACKNOWLEDGEMENT_TAG = 0x7268, 0x7269
_LONG = 1 << 18  # bytes of a message; measured, see benchmarks/README.md
_ENQUEUING = ("nccl", "nccl-legacy", "xccl", "hccl", "rccl")  # backends that queue on streams

Result = TypeVar("Result")
_Message = tuple[int, int, dist.Work]  # to or from which rank, in which turn


class TorchCommunicator(Communicator):
    """Exchanges over a torch.distributed process group of any backend.

    Args:
        group: the process group, by default the world; `abort` destroys it if all of it is on Gloo.
        connections: 1 to 64, of the private connections to each other rank that `apart` makes, as
            the hook does, for CPU tensors on Gloo. Long messages are striped over them. Exchanges
            over the group itself have the group's own.

    Raises:
        RuntimeError: torch.distributed is not initialized, or this rank is not in the group.
        TypeError: the group is not a process group, or connections not an integer.
        ValueError: connections is out of its range.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, connections: int = 1) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "TorchCommunicator: torch.distributed is not initialized; call "
                "torch.distributed.init_process_group first (and start the script with torchrun)"
            )
        outside: Any = dist.GroupMember.NON_GROUP_MEMBER
        if group == outside:
            raise RuntimeError("TorchCommunicator: this rank is not a member of the group")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"TorchCommunicator: group={group!r} must be a process group, as returned by "
                "torch.distributed.new_group()"
            )
        self.timeout = timeout_of(group or dist.group.WORLD)
        self.connections = check_connections(connections, "TorchCommunicator")
        self._set_up(group, dist.get_process_group_ranks(group))
        if connections > 1:
            check_stripes(connections, backend_of(self.group, "cpu"), "cpu")

    @classmethod
    def of_its_own(
        cls,
        parent: dist.ProcessGroup,
        device: str,
        timeout: timedelta | None = None,
        connections: int = 1,
    ) -> Communicator:
        """The ranks of `parent` over private connections; all of them must call it.

        In place of Gloo, tensors in host memory go over sockets that the calling thread drives, if
        all ranks can be reached so (see `connecting.py`).

        Args:
            parent: a process group, whose backend for the device is used.
            device: kind of the device that exchanges come from.
            timeout: for the exchanges, and for connecting; by default torch's (Gloo: 30 minutes).
            connections: see `TorchCommunicator`.

        Raises:
            RuntimeError: another rank did not call it in time, or died.
            ValueError: there can be only one connection; or RHTCOMM_TRANSPORT is neither "sockets"
                nor "gloo".
        """
        ranks = dist.get_process_group_ranks(parent)
        check_stripes(connections, backend_of(parent, device), device)
        if backend_of(parent, device) == "gloo":
            timeout = timeout or default_pg_timeout
            return cls._instead_of_gloo(parent, ranks, device, timeout, connections)
        group = dist.new_group(
            ranks,
            timeout=timeout,
            backend=dist.get_backend(parent),
            use_local_synchronization=len(ranks) < dist.get_world_size(),
            device_id=getattr(parent, "bound_device_id", None),
        )
        assert group is not None
        made = cls(group)
        made.private = True
        return made

    @classmethod
    def _instead_of_gloo(
        cls,
        parent: dist.ProcessGroup,
        ranks: list[int],
        device: str,
        timeout: timedelta,
        connections: int,
    ) -> Communicator:
        check_transport()
        meeting, rank = Meeting(parent, timeout), parent.rank()
        found: dict[int, list[socket.socket]] | str = f"{device} tensors need it"
        if device == "cpu":
            found = open_sockets(parent, meeting, timeout, connections)
        if not isinstance(found, str):
            names = [name_of(other, ranks) for other in range(len(ranks))]
            opened = {
                other: [Connection(one, names[other]) for one in several]
                for other, several in found.items()
            }
            sockets = SocketCommunicator(rank, ranks, opened, timeout, connections)
            sockets.greet()
            meeting.end()
            return sockets
        check_stripes(connections, f"a private Gloo group, since {found}", device)
        name = meeting.tell(uuid.uuid4().bytes)[0].hex()
        made = cls.__new__(cls)
        made.private, made.timeout, made.connections = True, timeout, connections
        made._set_up(gloo.connect(name, rank, len(ranks), timeout), ranks)
        meeting.end()
        return made

    def apart(self, device: str) -> "Communicator":
        # A user's subclass may override the exchanges.
        if self.private or type(self) is not TorchCommunicator:
            return self
        if backend_of(self.group, device) != "gloo":
            return self
        return self.of_its_own(self.group, device, self.timeout, self.connections)

    def _set_up(self, group: Any, ranks: list[int]) -> None:
        self._group, self._aborted = group, False
        self.bytes_sent = 0
        self._ranks = ranks
        group = self.group
        self._rank, self._world_size = int(group.rank()), int(group.size())
        # Each rank begins with its neighbour, so that no rank receives from all others first.
        self._others = [(self._rank + i) % self._world_size for i in range(1, self._world_size)]
        self._in_flight = 0  # exchanges whose messages have not arrived
        self._turn = 0  # number of calls of `settle`
        self._settled = True
        self._sent: list[_Message] = []  # not yet confirmed by the others
        self._heard = [0] * self._world_size  # by rank, the turn of its last message
        self._acknowledgements = [  # their content does not matter
            [torch.zeros(1, dtype=torch.uint8, device="cpu")] * self._world_size,
            torch.zeros(self._world_size, 1, dtype=torch.uint8, device="cpu").unbind(0),
        ]

    @property
    def group(self) -> Any:
        """The process group, given or private."""
        if self._aborted:
            raise RuntimeError(
                f"TorchCommunicator: {self.name_of(self.rank)} of {self.world_size} failed and "
                "left the group; restart the program, or make new groups on all ranks"
            )
        group = dist.group.WORLD if self._group is None else self._group
        if group is None:
            raise RuntimeError(
                "TorchCommunicator: torch.distributed is no longer initialized; create a new "
                "communicator"
            )
        return group

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def ranks(self) -> list[int]:
        """World ranks, in the order of the group."""
        return list(self._ranks)

    def carriers(self) -> list[object]:
        return [self.group]

    def name_of(self, rank: int) -> str:
        return name_of(rank, self._ranks)

    @property
    def patience(self) -> str:
        if self.timeout is None:
            return "its timeout"
        return f"its timeout of {self.timeout.total_seconds():g} s"

    def enqueues(self, device: str) -> bool:
        return isinstance(self.group, dist.ProcessGroup) and (
            backend_of(self.group, device) in _ENQUEUING
        )

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        nbytes = x.numel()
        gathered = x.new_empty(self._world_size, nbytes)
        self.bytes_sent += (self._world_size - 1) * nbytes
        rows = gathered.unbind(0)
        if not x.is_cpu:
            return self._collective(self.group.allgather([list(rows)], [x]), gathered)
        rows[self._rank].copy_(x)
        return self._swap([x] * self._world_size, rows, nbytes, gathered)

    def start_all_to_all(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        x = x.contiguous()
        received = torch.empty_like(x)
        nbytes = x.shape[1]
        self.bytes_sent += (self._world_size - 1) * nbytes
        if not x.is_cpu:
            work = self.group.alltoall_base(received, x, [], [])
            return self._collective(work, received)
        outgoing, incoming = x.unbind(0), received.unbind(0)
        incoming[self._rank].copy_(outgoing[self._rank])
        return self._swap(outgoing, incoming, nbytes, received)

    def start_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        gathered = x.new_empty(self._world_size, x.numel()) if self._rank == 0 else None
        self.bytes_sent += 0 if self._rank == 0 else x.numel()
        if not x.is_cpu:
            options = dist.GatherOptions()
            options.rootRank = 0
            targets = [] if gathered is None else [list(gathered)]
            return self._collective(self.group.gather(targets, [x], options), gathered)
        if gathered is None:
            self._send([x], [0])
            return lambda: None
        gathered[0] = x
        return self._arrival(self._receive(gathered.unbind(0), self._others), gathered)

    def start_broadcast(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.bytes_sent += (self._world_size - 1) * x.numel() if self._rank == 0 else 0
        if not x.is_cpu:
            options = dist.BroadcastOptions()
            options.rootRank = 0
            return self._collective(self.group.broadcast([x], options), x)
        if self._rank == 0:
            self._send([x] * self._world_size, self._others)
            return lambda: x
        return self._arrival(self._receive([x], [0]), x)

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        self.start_all_reduce(x, op)()

    def start_all_reduce(
        self, x: torch.Tensor, op: Literal["sum", "max"] = "sum"
    ) -> Callable[[], torch.Tensor]:
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        self.bytes_sent += self.ring_bytes(x.nbytes)
        return self._collective(self.group.allreduce([x], options), x)

    def _collective(self, work: dist.Work | None, result: Result) -> Callable[[], Result]:
        """A function that waits for a collective; until then it keeps the tensors alive."""
        works = [work]

        def finish() -> Result:
            work = works.pop()  # else an error's traceback keeps it and its connections
            assert work is not None  # None only on ranks outside of the group
            work.wait()
            return result

        return finish

    # Gloo's own collectives use a pool of two threads. That costs hand-overs, and two chunks share
    # the link, so that both arrive late. Plain messages avoid both.

    def _swap(
        self,
        outgoing: Sequence[torch.Tensor],
        incoming: Sequence[torch.Tensor],
        nbytes: int,
        result: torch.Tensor,
    ) -> Callable[[], torch.Tensor]:
        """Send outgoing[i] to rank i, and receive incoming[i] from it; each has `nbytes` bytes."""
        # If the other rank has posted its receive, data leaves at once from this thread, and while
        # data comes in, Gloo's thread spins for the connection's lock. So a short exchange that is
        # alone posts its receives last, and its data leaves on Gloo's thread. Other exchanges post
        # receives first, or data would leave late: Gloo's thread has to wait for a core, and
        # requests for data queue behind other data.
        if self._in_flight == 0 and nbytes < _LONG:
            self._send(outgoing, self._others)
            arriving = self._receive(incoming, self._others)
        else:
            arriving = self._receive(incoming, self._others)
            self._send(outgoing, self._others)
        return self._arrival(arriving, result)

    # If a connection closes just as the other side posts its receive, Gloo loses the message, and
    # waiting for the send never returns. Waiting for a receive fails at once instead. So a rank
    # waits for a send only after the other rank has confirmed its arrival by a message of a later
    # turn: a rank begins a turn only with all messages of the previous one received.

    def settle(self, wait: bool = True) -> None:
        self._turn += 1
        if wait and not self._settled:
            outgoing, incoming = self._acknowledgements
            # Receives first: a rank's requests arrive before its data, so a rank that has its
            # acknowledgements has also sent its own, and may leave.
            arriving = self._receive(incoming, self._others, _ACKNOWLEDGEMENT_TAG)
            self._send(outgoing, self._others, _ACKNOWLEDGEMENT_TAG)
            self._arrival(arriving, None)()
            self._turn += 1  # so that later messages confirm the acknowledgements
            self._settled = True

    # Neither may hold the group in a local variable: an error's traceback would keep its
    # connections open.

    def _receive(
        self, rows: Sequence[torch.Tensor], ranks: Sequence[int], tag: int = _TAG
    ) -> list[_Message]:
        """Receive rows[i] from rank i."""
        self._settled = False
        turn = self._turn
        return [(rank, turn, self.group.recv([rows[rank]], rank, tag)) for rank in ranks]

    def _send(self, rows: Sequence[torch.Tensor], ranks: Sequence[int], tag: int = _TAG) -> None:
        """Send rows[i] to rank i."""
        self._settled = False
        for rank in ranks:
            self._sent.append((rank, self._turn, self.group.send([rows[rank]], rank, tag)))

    def _arrival(self, arriving: list[_Message], result: Result) -> Callable[[], Result]:
        """A function that waits for the messages."""
        self._in_flight += 1

        def finish() -> Result:
            heard, news = self._heard, False
            try:
                for rank, turn, work in arriving:
                    work.wait()
                    if turn > heard[rank]:
                        heard[rank], news = turn, True
            finally:
                self._in_flight -= 1
                arriving.clear()  # else an error's traceback keeps them and their connections
            if news:
                for rank, turn, work in self._sent:
                    if turn < heard[rank]:
                        work.wait()
                self._sent = [sent for sent in self._sent if sent[1] >= heard[sent[0]]]
            return result

        return finish

    def abort(self) -> None:
        """Leave the group; on Gloo its connections then close, and the other ranks raise.

        They close when the last reference to the group is gone, so keep no reference, nor to the
        DeviceMesh that made it; otherwise the others wait for the timeout. They also wait if the
        group is the world, which others use and which stays open, and if it has another backend
        too, which reports failures itself and may block when it is destroyed (NCCL).
        """
        group, self._group, self._aborted = self._group, None, True
        self._sent.clear()  # they refer to its connections
        if group is None or group is dist.group.WORLD:
            return
        # torch does not know private Gloo groups; this was the last reference to one.
        if isinstance(group, dist.ProcessGroup) and backends_of(group) == {"gloo"}:
            destroy(group)

    def close(self) -> None:
        """Close private connections (see `of_its_own`), but not those of a group that the user
        passed."""
        if self.private:
            group, self._group, self._aborted = self._group, None, True
            self._sent.clear()
            destroy(group)
