"""How payloads travel: the few exchanges that the collectives are made of."""

import contextlib
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import default_pg_timeout, distributed_c10d

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Communicator",
    "HierarchicalCommunicator",
    "MPICommunicator",
    "TorchCommunicator",
    "backend_of",
    "users",
]

# Of our messages on a process group that others may use too; those with one tag stay in order.
# Receipts and names have their own: in a longer message's place one would end the process.
_TAG, _RECEIPT_TAG, _NAME_TAG = 0x7268, 0x7269, 0x726A
_LONG = 1 << 18  # bytes of a message, by measurement: see benchmarks/README.md

Result = TypeVar("Result")


def ring_bytes(nbytes: int, world_size: int) -> int:
    """What each of `world_size` ranks sends in a ring all-reduce of so many bytes."""
    return round(2 * (world_size - 1) * nbytes / world_size)


def backend_of(group: dist.ProcessGroup, device: str) -> str:
    """The backend that carries a group's tensors on a kind of device, such as "gloo"."""
    config = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    backends = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)
    return backends.get(device, config)


class Users:
    """Who may send by what carries messages: one user at a time, numbered alike on all ranks.

    Two users of one process group whose exchanges are under way at once would get each other's
    messages, and nothing in a message that is not compressed tells whose it is. So the second one
    is refused; and payloads carry the number of their user (`Key.owner`), which ranks compare once.
    """

    def __init__(self) -> None:
        # The garbage collector may have a thread that is in here give something back.
        self._lock = threading.RLock()
        self._numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._using: weakref.WeakKeyDictionary[object, weakref.ref[object]]
        self._using = weakref.WeakKeyDictionary()

    def number(self, carriers: list[object]) -> int:
        """0 for the first user of what carries a communicator's messages, and so on."""
        with self._lock:
            number = max(self._numbers.get(carrier, 0) for carrier in carriers)
            for carrier in carriers:
                self._numbers[carrier] = number + 1
        return number

    def take(self, carriers: list[object], user: object) -> None:
        """Let `user` send by them until `give_back`.

        Raises:
            RuntimeError: somebody else does.
        """
        with self._lock:
            for carrier in carriers:
                other = self._using[carrier]() if carrier in self._using else None
                if other is not None and other is not user:
                    raise RuntimeError(
                        f"rhtcomm: {user} would send by {carrier}, by which {other} is sending "
                        "now, and their messages would be taken for each other's; give each a "
                        "communicator over a group of its own (torch.distributed.new_group()), or "
                        "let one wait for the other"
                    )
            for carrier in carriers:
                self._using[carrier] = weakref.ref(user)

    @contextlib.contextmanager
    def using(
        self, communicator: "Communicator | HierarchicalCommunicator", user: object
    ) -> Iterator[None]:
        """Have a communicator for a while, unless `user` has it already."""
        carriers = [] if communicator.private else communicator.carriers()
        with self._lock:
            users = [self._using[carrier]() for carrier in carriers if carrier in self._using]
        had = len(users) == len(carriers) and all(other is user for other in users)
        self.take(carriers, user)
        try:
            yield
        finally:
            if not had:
                self.give_back(user)

    def give_back(self, user: object) -> None:
        with self._lock:
            for carrier in [c for c, other in self._using.items() if other() is user]:
                del self._using[carrier]


users = Users()


class Communicator(Protocol):
    """Exchanges among `world_size` ranks; every rank makes the same calls in one order.

    A `start_...` returns at once, with a function that waits for the result and gives it. Several
    exchanges may be under way, to be finished in the order in which they were started; `settle`
    follows the last of them. What they send belongs to them until `settle` has waited.
    """

    bytes_sent: int
    """By this rank so far. Reductions count as a ring's, a broadcast as sent by the root alone."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def ring_bytes(self, nbytes: int) -> int:
        """What a rank sends in an uncompressed ring all-reduce of so many bytes."""
        return ring_bytes(nbytes, self.world_size)

    private: bool = False
    """Whether nobody else can send by what carries its messages."""

    def apart(self, device: str) -> "Communicator":
        """The same ranks by connections of its own, for tensors on a kind of device; all call it.

        Where that cannot be had, itself: see `private`.
        """
        return self

    def carriers(self) -> list[object]:
        """What carries its messages, and may carry those of other communicators (see `Users`)."""
        return [self]

    def name_of(self, rank: int) -> str:
        """A rank in words, by its number here and, where that differs, in the world."""
        return f"rank {rank}"

    @property
    def patience(self) -> str:
        """How long an exchange waits for other ranks, in words."""
        return "its timeout"

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """x (m,) uint8 -> (world_size, m) uint8, row i being the x of rank i."""
        ...

    def start_all_to_all(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """x (world_size, m) uint8 -> (world_size, m), row i being rank i's row for this rank."""
        ...

    def start_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        """x (m,) uint8 -> on rank 0 (world_size, m), row i the x of rank i; elsewhere None."""
        ...

    def start_broadcast(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Contiguous x (m,) uint8 becomes that of rank 0, in place."""
        ...

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Sum or maximum of contiguous tensors over ranks, in place, the same bits everywhere."""
        ...

    def settle(self, wait: bool = True) -> None:
        """Called on all ranks alike when all exchanges started so far are finished there.

        With `wait`, it returns when the others have all that this rank sent. Without, later
        exchanges show that; but a rank must not leave before it has waited once more. By default
        nothing needs to be done for that.
        """
        return None

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`start_all_gather`, finished and settled."""
        gathered = self.start_all_gather(x)()
        self.settle()
        return gathered

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """`start_all_to_all`, finished and settled."""
        received = self.start_all_to_all(x)()
        self.settle()
        return received

    def abort(self) -> None:
        """Tell the others, where that can be done, that this rank gives up.

        Nothing can be exchanged after it. Unless a class says otherwise it does nothing, and the
        others wait for their timeout.
        """
        return None

    def close(self) -> None:
        """End what is its own alone (see `apart`); by default nothing is."""
        return None


class _Message(NamedTuple):
    """To or from another rank of a group."""

    rank: int
    turn: int
    work: dist.Work


class TorchCommunicator(Communicator):
    """Exchanges over a torch.distributed process group of any backend.

    Args:
        group: the process group, by default the world. After `abort` it is destroyed on Gloo.

    Raises:
        RuntimeError: torch.distributed is not initialized, or this rank is not in the group.
        TypeError: the group is no process group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "TorchCommunicator: torch.distributed is not initialized; call "
                "torch.distributed.init_process_group first (and launch by torchrun)"
            )
        outside: Any = dist.GroupMember.NON_GROUP_MEMBER
        if group == outside:
            raise RuntimeError("TorchCommunicator: this rank is not a member of the group")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"TorchCommunicator: group={group!r} must be a process group, such as "
                "torch.distributed.new_group() returns"
            )
        self._devices: set[str] = set()  # kinds, that exchanges came from
        self.timeout = _timeout_of(group or dist.group.WORLD)
        self._set_up(group, dist.get_process_group_ranks(group))

    @classmethod
    def of_its_own(
        cls, parent: dist.ProcessGroup, device: str, timeout: timedelta | None = None
    ) -> "TorchCommunicator":
        """The ranks of `parent` over connections that nobody else uses; all of them call it.

        Args:
            parent: a process group; its backend for the device is taken.
            device: kind of the device that exchanges come from.
            timeout: of the exchanges, and of making it; by default torch's (Gloo: 30 minutes).

        Raises:
            RuntimeError: another rank did not call it in time, or ended.
        """
        ranks = dist.get_process_group_ranks(parent)
        if backend_of(parent, device) == "gloo":
            timeout = timeout or default_pg_timeout
            made = cls.__new__(cls)
            made._devices, made.private, made.timeout = set(), True, timeout
            made._set_up(_gloo_group(parent, timeout), ranks)
            return made
        group = dist.new_group(
            ranks,
            timeout=timeout,
            backend=dist.get_backend(parent),
            use_local_synchronization=len(ranks) < dist.get_world_size(),
        )
        assert group is not None
        made = cls(group)
        made.private = True
        return made

    def apart(self, device: str) -> "Communicator":
        # A class of the user's may do something else on the way.
        if self.private or type(self) is not TorchCommunicator:
            return self
        if backend_of(self.group, device) != "gloo":
            return self
        return self.of_its_own(self.group, device, self.timeout)

    def _set_up(self, group: Any, ranks: list[int]) -> None:
        self._group, self._aborted = group, False
        self.bytes_sent = 0
        self._ranks = ranks
        group = self.group
        self._rank, self._world_size = int(group.rank()), int(group.size())
        # Each begins with its neighbour, so that no rank is the first to hear from all.
        self._others = [(self._rank + i) % self._world_size for i in range(1, self._world_size)]
        self._unsettled = False
        self._under_way = 0  # exchanges of `_swap`
        self._turn = 0  # how often `settle` was called
        self._sent: list[_Message] = []  # of which the others have not yet said that they have it
        self._heard = [0] * self._world_size  # by rank, the turn of its last message

    @property
    def group(self) -> Any:
        """The process group that it was made with, or its own."""
        if self._aborted:
            raise RuntimeError(
                f"TorchCommunicator: {self.name_of(self.rank)} of {self.world_size} gave up and "
                "left the group; start the program again, or make new groups on all ranks"
            )
        group = dist.group.WORLD if self._group is None else self._group
        if group is None:
            raise RuntimeError(
                "TorchCommunicator: torch.distributed is not initialized any more; make a new one"
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
        """Of the world, in the order of the group."""
        return list(self._ranks)

    def carriers(self) -> list[object]:
        return [self.group]

    def name_of(self, rank: int) -> str:
        return _name_of(rank, self._ranks)

    @property
    def patience(self) -> str:
        if self.timeout is None:
            return "its timeout"
        return f"its timeout of {self.timeout.total_seconds():g} s"

    def _on_cpu(self, x: torch.Tensor) -> bool:
        self._devices.add(x.device.type)
        return x.device.type == "cpu"

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        gathered = x.new_empty(self.world_size, x.numel())
        self.bytes_sent += (self.world_size - 1) * x.numel()
        if self._on_cpu(x):
            gathered[self.rank] = x
            return self._swap([x] * self.world_size, gathered)
        return _finish(self.group.allgather([list(gathered)], [x]), gathered)

    def start_all_to_all(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        x = x.contiguous()
        received = torch.empty_like(x)
        self.bytes_sent += (self.world_size - 1) * x.shape[1]
        if self._on_cpu(x):
            received[self.rank] = x[self.rank]
            return self._swap(x, received)
        return _finish(self.group.alltoall_base(received, x, [], []), received)

    def start_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        gathered = x.new_empty(self.world_size, x.numel()) if self.rank == 0 else None
        self.bytes_sent += 0 if self.rank == 0 else x.numel()
        if not self._on_cpu(x):
            options = dist.GatherOptions()
            options.rootRank = 0
            rows = [] if gathered is None else [list(gathered)]
            return _finish(self.group.gather(rows, [x], options), gathered)
        if gathered is None:
            self._send([x], [0])
            return lambda: None
        gathered[0] = x
        return self._arrival(self._receive(gathered, self._others), gathered)

    def start_broadcast(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.bytes_sent += (self.world_size - 1) * x.numel() if self.rank == 0 else 0
        if not self._on_cpu(x):
            options = dist.BroadcastOptions()
            options.rootRank = 0
            return _finish(self.group.broadcast([x], options), x)
        if self.rank == 0:
            self._send([x] * self.world_size, self._others)
            return lambda: x
        return self._arrival(self._receive([x], [0]), x)

    # Gloo's own collectives go through a pool of two threads, which costs hand-overs and lets two
    # chunks share a link, so that both arrive late. Plain messages do neither.

    def _swap(
        self, rows: Sequence[torch.Tensor] | torch.Tensor, received: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """Send row i to rank i, for one of its own."""
        # Data leaves at once, from this thread, where the other has asked for it; and while data
        # comes in, Gloo's thread spins for the lock of the connection. So a short exchange that is
        # alone asks later, and its data leaves on Gloo's thread. Others would leave late: that
        # thread has to wait for a core, and what asks for data queues behind other data.
        ask_later = self._under_way == 0 and received.shape[1] < _LONG
        self._under_way += 1
        if ask_later:
            self._send(rows, self._others)
        arriving = self._receive(received, self._others)
        if not ask_later:
            self._send(rows, self._others)
        finish = self._arrival(arriving, received)

        def finish_swap() -> torch.Tensor:
            result = finish()
            self._under_way -= 1
            return result

        return finish_swap

    # A message that finds its connection closed just as the other side asks for it is lost to Gloo,
    # which then never says whether it was sent, while those who receive hear of a closed connection
    # at once. So a rank asks about what it sent only after the other has shown that it came: by a
    # message of a later turn, which it begins with all of the one before in hand.

    def settle(self, wait: bool = True) -> None:
        self._turn += 1
        if wait and self._unsettled:
            receipts = torch.zeros(self.world_size, 1, dtype=torch.uint8, device="cpu")
            # Receives first: what the other asks for comes ahead of what it sends, so whoever has
            # its receipts has also sent its own, and may leave.
            arriving = self._receive(receipts, self._others, _RECEIPT_TAG)
            self._send(receipts, self._others, _RECEIPT_TAG)
            self._arrival(arriving, None)()
            self._turn += 1  # so that later messages show that the receipts came
            self._unsettled = False

    # Neither may name the group: an error's traceback would keep it, and with it the connections.

    def _receive(
        self, rows: Sequence[torch.Tensor] | torch.Tensor, ranks: Sequence[int], tag: int = _TAG
    ) -> list[_Message]:
        """Row i from rank i."""
        self._unsettled = True
        return [
            _Message(rank, self._turn, self.group.recv([rows[rank]], rank, tag)) for rank in ranks
        ]

    def _send(
        self, rows: Sequence[torch.Tensor] | torch.Tensor, ranks: Sequence[int], tag: int = _TAG
    ) -> None:
        """Row i to rank i."""
        self._unsettled = True
        for rank in ranks:
            self._sent.append(_Message(rank, self._turn, self.group.send([rows[rank]], rank, tag)))

    def _arrival(self, arriving: list[_Message], result: Result) -> Callable[[], Result]:
        """What waits for messages."""

        def finish() -> Result:
            news = False
            try:
                for rank, turn, work in arriving:
                    work.wait()
                    if turn > self._heard[rank]:
                        self._heard[rank], news = turn, True
            finally:
                arriving.clear()  # they keep connections, and an error's traceback this closure
            if news:
                for rank, turn, work in self._sent:
                    if turn < self._heard[rank]:
                        work.wait()
                self._sent = [sent for sent in self._sent if sent.turn >= self._heard[sent.rank]]
            return result

        return finish

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        self._on_cpu(x)
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        _finish(self.group.allreduce([x], options), None)()
        self.bytes_sent += self.ring_bytes(x.nbytes)

    def abort(self) -> None:
        """Leave the group; on Gloo its connections then close and wake the others.

        They close when the last reference to the group goes, so keep none, nor the DeviceMesh that
        made it: otherwise the others wait for the timeout. So they do where the group is the world,
        which is not this communicator's alone and stays as it is, and on other backends, where it
        is for the backend to tell the others (NCCL's watchdog does).
        """
        group, self._group, self._aborted = self._group, None, True
        self._sent.clear()  # they refer to its connections
        if group is None or group is dist.group.WORLD:
            return
        # A private one on Gloo is unknown to torch, and the reference was the last.
        if isinstance(group, dist.ProcessGroup):
            backends = {backend_of(group, device) for device in self._devices or {"cpu"}}
            if backends == {"gloo"}:
                _destroy(group)

    def close(self) -> None:
        """End connections of its own (see `of_its_own`); nothing for a group of the user's."""
        if self.private:
            group, self._group, self._aborted = self._group, None, True
            self._sent.clear()
            _destroy(group)


_ProcessGroupGloo: Any = getattr(dist, "ProcessGroupGloo", object)  # which a build may lack


class _GlooGroup(_ProcessGroupGloo):  # type: ignore[misc]
    def __init__(self, name: str, *arguments: object) -> None:
        super().__init__(*arguments)
        self.group_name = name


def _gloo_group(parent: dist.ProcessGroup, timeout: timedelta) -> _GlooGroup:
    """A Gloo group of the ranks of another one, which torch does not know of.

    torch names a group by a count that each rank keeps for itself. Ranks that are in other groups
    besides then wait for each other under different names; and after a group is gone, its name
    comes back, with the addresses of connections that are gone too.
    """
    rank, world_size = parent.rank(), parent.size()
    drawn, telling = _agree_on_a_name(parent, timeout)
    name = f"rhtcomm/{bytes(drawn.tolist()).hex()}"
    store: Any = distributed_c10d._get_default_store()
    with contextlib.suppress(
        RuntimeError, NotImplementedError, AttributeError
    ):  # not all kinds of store can
        # A connection of its own: a thread that waits at the store lets no other thread use it, and
        # another rank may wait for that one.
        store = store.clone()
    store = distributed_c10d.PrefixStore(name, store)
    group = _GlooGroup(name, store, rank, world_size, timeout)
    for told in telling:
        told.wait()  # they have connected, so they know the name
    # A rank that left while others still connect would have one of them fail, and the rest wait for
    # that one until the timeout.
    if store.add("connected", 1) == world_size:
        store.set("all are", "connected")
    store.wait(["all are"], timeout)
    return group


def _agree_on_a_name(
    parent: dist.ProcessGroup, timeout: timedelta
) -> tuple[torch.Tensor, list[dist.Work]]:
    """16 bytes that the first rank draws, and what is under way with them.

    It tells them when all ranks are there. So one that died on its way, or that failed and left, is
    found out at once by its connection to the first rank, whereas in the rendezvous of a new group
    it would be waited for. What the first rank tells then is zeros.

    Raises:
        RuntimeError: a rank died or left, or did not come in time.
    """
    rank, others = parent.rank(), range(1, parent.size())
    drawn = torch.tensor(list(uuid.uuid4().bytes), dtype=torch.uint8, device="cpu")
    if rank > 0:
        here = parent.send([torch.zeros_like(drawn)], 0, _NAME_TAG)
        parent.recv([drawn], 0, _NAME_TAG).wait(timeout)
        here.wait()
        if not drawn.any():
            raise RuntimeError("the first rank found the connection to another closed by it")
        return drawn, []
    lost: RuntimeError | None = None
    arriving = [parent.recv([torch.empty_like(drawn)], other, _NAME_TAG) for other in others]
    for arrival in arriving:
        try:
            arrival.wait(timeout)
        except RuntimeError as error:
            lost = lost or error
    if lost is None:
        return drawn, [parent.send([drawn], other, _NAME_TAG) for other in others]
    drawn.zero_()
    for other in others:
        with contextlib.suppress(RuntimeError):
            parent.send([drawn], other, _NAME_TAG).wait(timeout)
    raise lost


def _destroy(group: Any) -> None:
    """Make torch forget a group; its connections close when the last reference to it goes."""
    if isinstance(group, dist.ProcessGroup) and dist.is_initialized():
        with contextlib.suppress(ValueError):  # it went with the world that it was made in
            dist.destroy_process_group(group)


def _timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """How long the group waits on Gloo, where torch tells."""
    try:
        found = group._get_backend(torch.device("cpu")).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, timedelta) else None


class MPICommunicator(Communicator):
    """Exchanges over MPI, by mpi4py's buffer interface; works without torch.distributed too.

    Start the ranks with mpiexec. Tensors must be in host memory.

    MPI's own waits spin on a core, which here the training thread needs: requests are polled
    instead, with sleeps that grow while nothing arrives. (A request makes progress only while
    somebody polls it.)

    Args:
        comm: an mpi4py intracommunicator, by default COMM_WORLD. It is duplicated, so messages
            of the program and of the exchanges cannot meet.
        timeout: seconds to wait for the other ranks in one exchange before raising; None waits for
            ever. MPI cannot take a started exchange back: after a timeout the program can only end.
            Nor can a rank tell the others that it gives up but by MPI_Abort, which ends the whole
            program and so is left to it: `abort` does nothing.

    Raises:
        ImportError: mpi4py is not installed.
        RuntimeError: MPI knows another number of ranks than torch does, as it happens where
            torchrun alone started the processes: then each is an MPI world of its own.
        TypeError: the timeout is no number.
        ValueError: the timeout is not positive.
    """

    def __init__(self, comm: "MPI.Intracomm | None" = None, timeout: float | None = 1800.0) -> None:
        if timeout is not None and not isinstance(timeout, (int, float)):
            raise TypeError(
                f"MPICommunicator: timeout={timeout!r} must be a number of seconds, or None"
            )
        if timeout is not None and not timeout > 0:
            raise ValueError(f"MPICommunicator: timeout={timeout!r} must be positive, or None")
        try:
            from mpi4py import MPI
        except ImportError as missing:
            raise ImportError(
                "MPICommunicator needs mpi4py and an MPI library: pip install 'rhtcomm[mpi]'"
            ) from missing
        if comm is None:
            comm = MPI.COMM_WORLD
            expected = os.environ.get("WORLD_SIZE")
            if dist.is_initialized():
                expected = str(dist.get_world_size())
            if expected is not None and int(expected) != comm.size:
                raise RuntimeError(
                    f"MPICommunicator: MPI has {comm.size} rank(s) but torch has {expected}; start "
                    f"the program with mpiexec -n {expected} (see launch/mpirun.sh), not by "
                    "torchrun alone"
                )
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise RuntimeError(
                "MPICommunicator: MPI was initialized without support for threads; let mpi4py "
                "initialize it, or ask for MPI_THREAD_MULTIPLE"
            )
        self.comm = comm.Dup()
        self.timeout = timeout
        self.bytes_sent = 0
        self._under_way: list[MPI.Request] = []
        self._in_place: Any = MPI.IN_PLACE
        self._ranks = MPI.Group.Translate_ranks(comm.Get_group(), None, MPI.COMM_WORLD.Get_group())
        self._operations: dict[str, Any] = {"sum": MPI.SUM, "max": MPI.MAX}

    @property
    def rank(self) -> int:
        return int(self.comm.rank)

    @property
    def world_size(self) -> int:
        return int(self.comm.size)

    def name_of(self, rank: int) -> str:
        return _name_of(rank, self._ranks)

    @property
    def patience(self) -> str:
        return "its timeout" if self.timeout is None else f"its timeout of {self.timeout:g} s"

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        gathered = x.new_empty(self.world_size, x.numel())
        self.bytes_sent += (self.world_size - 1) * x.numel()
        request = self.comm.Iallgather(_host_array(x), _host_array(gathered))
        return self._finish(request, gathered)

    def start_all_to_all(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        x = x.contiguous()
        received = torch.empty_like(x)
        self.bytes_sent += (self.world_size - 1) * x.shape[1]
        request = self.comm.Ialltoall(_host_array(x), _host_array(received))
        return self._finish(request, received)

    def start_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        gathered = x.new_empty(self.world_size, x.numel()) if self.rank == 0 else None
        self.bytes_sent += 0 if self.rank == 0 else x.numel()
        target = None if gathered is None else _host_array(gathered)
        return self._finish(self.comm.Igather(_host_array(x), target), gathered)

    def start_broadcast(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.bytes_sent += (self.world_size - 1) * x.numel() if self.rank == 0 else 0
        return self._finish(self.comm.Ibcast(_host_array(x)), x)

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        request = self.comm.Iallreduce(self._in_place, _host_array(x), self._operations[op])
        self._finish(request, x)()
        self.bytes_sent += self.ring_bytes(x.nbytes)

    def close(self) -> None:
        """Free the duplicated communicator; all ranks must call it."""
        self.comm.Free()

    def _finish(self, request: "MPI.Request", result: Result) -> Callable[[], Result]:
        """What waits for the request."""
        # MPI writes into the buffers, which live as long as the request, whoever forgets about it.
        self._under_way.append(request)
        request.Test()  # moves the earlier ones on too

        def finish() -> Result:
            self._wait(request)
            self._under_way = [other for other in self._under_way if other is not request]
            return result

        return finish

    def _wait(self, request: "MPI.Request") -> None:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        pause = 0.0
        while not request.Test():
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(
                    f"MPICommunicator: {self.name_of(self.rank)} of {self.world_size} waited "
                    f"{self.timeout:g} s for the others: one of them died, hangs, or makes other "
                    "calls than this one"
                )
            # The first polls only give way to other threads, the later ones to the whole core.
            time.sleep(pause)
            pause = min(1e-3, pause + 1e-6)


class HierarchicalCommunicator:
    """Two levels for several ranks a node: full precision within it, compressed between nodes.

    Args:
        within: the ranks of this node.
        between: the ranks that have this one's place in their nodes, one of each node, in the same
            order for every place. Both are communicators, or process groups of torch.

    Every rank of a node takes a share of the tensor to the other nodes, so `between` is a different
    group for each place in a node. All nodes must have as many ranks, or the first exchange raises
    ValueError on all of them.

    Raises:
        RuntimeError: torch.distributed is not initialized, or this rank is in neither group.
    """

    def __init__(
        self,
        within: "Communicator | dist.ProcessGroup",
        between: "Communicator | dist.ProcessGroup",
    ) -> None:
        for name, level in (("within", within), ("between", between)):
            if isinstance(level, (str, type)) or not (
                isinstance(level, dist.ProcessGroup) or hasattr(level, "start_all_gather")
            ):
                raise TypeError(
                    f"HierarchicalCommunicator: {name}={level!r} must be a communicator, such as "
                    "rhtcomm.MPICommunicator(), or a process group"
                )
        self.within, self.between = (
            TorchCommunicator(level) if isinstance(level, dist.ProcessGroup) else level
            for level in (within, between)
        )
        self._even = False

    @classmethod
    def from_mesh(cls, mesh: "DeviceMesh") -> "HierarchicalCommunicator":
        """From a two-dimensional DeviceMesh (nodes, ranks of a node).

        ``HierarchicalCommunicator.from_mesh(init_device_mesh("cpu", (nodes, ranks_of_a_node)))``

        Raises:
            TypeError: the mesh is none.
            ValueError: the mesh has another number of dimensions, or its groups number their ranks
                in another order than it lists them.
        """
        if not hasattr(mesh, "get_group"):
            raise TypeError(
                f"HierarchicalCommunicator: mesh={mesh!r} must be a DeviceMesh, such as "
                "torch.distributed.device_mesh.init_device_mesh returns"
            )
        if mesh.ndim != 2:
            raise ValueError(
                f"HierarchicalCommunicator: the mesh has {mesh.ndim} dimension(s), but takes two: "
                "(nodes, ranks of a node)"
            )
        # torch sorts the ranks of a group. Every rank looks at the whole mesh: all raise, or none.
        rows: list[list[int]] = mesh.mesh.tolist()
        if any(list(line) != sorted(line) for line in (*rows, *zip(*rows, strict=True))):
            raise ValueError(
                f"HierarchicalCommunicator: the mesh lists ranks as {rows}, but the groups that "
                "torch makes of its rows and columns number them in ascending order, so a rank's "
                "place in its node would not be the mesh's; list the ranks of every row and column "
                "in ascending order"
            )
        return cls(within=mesh.get_group(1), between=mesh.get_group(0))

    @property
    def private(self) -> bool:
        return self.within.private and self.between.private

    def apart(self, device: str) -> "HierarchicalCommunicator":
        """Both levels'; see `Communicator.apart`."""
        within, between = self.within.apart(device), self.between.apart(device)
        if within is self.within and between is self.between:
            return self
        return HierarchicalCommunicator(within, between)

    def carriers(self) -> list[object]:
        return [*self.within.carriers(), *self.between.carriers()]

    def name_of(self, rank: int) -> str:
        known = rank == self.rank and dist.is_initialized()
        return _name_of(rank, {rank: dist.get_rank() if known else rank})

    @property
    def patience(self) -> str:
        return self.between.patience

    def close(self) -> None:
        """End what either level has of its own (see `apart`), and nothing of the user's."""
        for level in (self.within, self.between):
            if level.private:
                level.close()

    @property
    def bytes_sent(self) -> int:
        """By this rank to other nodes; `within.bytes_sent` has the rest."""
        return self.between.bytes_sent

    @property
    def rank(self) -> int:
        return self.between.rank * self.within.world_size + self.within.rank

    @property
    def world_size(self) -> int:
        return self.between.world_size * self.within.world_size

    def ring_bytes(self, nbytes: int) -> int:
        """What a rank would send to other nodes if the same exchange were not compressed."""
        return round(self.between.ring_bytes(nbytes) / self.within.world_size)

    def check_nodes(self, device: torch.device) -> None:
        """Before the first exchange, see that the ranks of both levels make a grid.

        All nodes have as many ranks, all ranks of a node are of the same node for the others, and
        all ranks that share a place have that place in their own nodes.

        Raises:
            ValueError: on every rank, naming what differs.
        """
        if self._even:
            return
        within, between = self.within, self.between

        def differs(level: Communicator, number: int) -> bool:
            """Whether the ranks of a level have other numbers than this one."""
            ends = torch.tensor([number, -number], device=device)
            level.all_reduce_(ends, "max")
            highest, lowest = ends.tolist()
            return bool(highest != -lowest)

        sizes = (within.world_size, between.world_size)
        crossed = differs(within, between.rank) | differs(between, within.rank)
        # The first place of a node sees all other nodes, and by the third step all places do.
        most = torch.tensor([*sizes, *(-size for size in sizes), crossed], device=device)
        for level in (within, between, within):
            level.all_reduce_(most, "max")
        ranks, nodes, fewest_ranks, fewest_nodes, anywhere = most.abs().tolist()
        if (ranks, nodes) != (fewest_ranks, fewest_nodes):
            raise ValueError(
                f"HierarchicalCommunicator: nodes have {fewest_ranks} to {ranks} ranks, and places "
                f"in a node {fewest_nodes} to {nodes} nodes; give all nodes as many ranks, or use "
                "one level"
            )
        if anywhere:
            raise ValueError(
                "HierarchicalCommunicator: the ranks of a node number the nodes differently, or "
                "the ranks that share a place are not at the same place of their nodes; list the "
                "ranks of all groups in one order"
            )
        self._even = True

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x (m,) uint8 -> (world_size, m) uint8, row i being the x of rank i."""
        self.check_nodes(x.device)
        columns = self.between.all_gather(x)
        gathered = self.within.all_gather(columns.flatten())
        gathered = gathered.view(self.within.world_size, self.between.world_size, -1)
        return gathered.transpose(0, 1).flatten(0, 1)

    def settle(self, wait: bool = True) -> None:
        """Both levels'; see `Communicator.settle`."""
        self.between.settle(wait)
        self.within.settle(wait)

    def abort(self) -> None:
        """Tell both levels that this rank gives up; see `TorchCommunicator.abort`.

        The rest of the ranks hear of it where those that heard it first abort as well, as the hook
        does.
        """
        try:
            self.within.abort()
        finally:
            self.between.abort()

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Sum or maximum of contiguous tensors over ranks, in place, the same bits everywhere."""
        self.check_nodes(x.device)
        self.between.all_reduce_(x, op)
        # The second level in an order of its own making: all nodes must round alike.
        rows = self.within.all_gather(x.view(-1).view(torch.uint8)).view(x.dtype)
        total = rows[0]
        for row in rows[1:]:
            total = total + row if op == "sum" else total.maximum(row)
        x.copy_(total.view_as(x))


def _name_of(rank: int, ranks: Sequence[int] | Mapping[int, int]) -> str:
    """Of a rank of a group, whose ranks in the world are given."""
    return f"rank {rank}" + (f" (rank {ranks[rank]} of the world)" if ranks[rank] != rank else "")


def _finish(work: dist.Work | None, result: Result) -> Callable[[], Result]:
    """What waits for a collective, which until then keeps hold of its tensors."""
    works = [work]

    def finish() -> Result:
        work = works.pop()  # it keeps connections open, and an error's traceback this closure
        assert work is not None  # it is where a rank is not of the group
        work.wait()
        return result

    return finish


def _host_array(x: torch.Tensor) -> Any:
    if x.device.type != "cpu":
        raise TypeError(
            f"MPICommunicator: a tensor lies on {x.device}, but MPI exchanges go through host "
            "memory; use TorchCommunicator there"
        )
    return x.detach().numpy()
