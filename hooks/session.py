"""What a state runs on: whose ranks, over which connections, and how that ends."""

import contextlib
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from ..communicators import Topology, users
from .connect import check_ranks, connect
from .engines import Engine
from .failures import cause_of, text_of
from .models import ranks_of

__all__ = ["Session"]

_log = logging.getLogger("rhtcomm")

MakeEngine = Callable[[Topology, int, torch.device], Engine]


class Session:
    """The life of a state among its ranks. It refers to no state, which could not go then.

    Args:
        process_group, timeout, given, connections: what the state was given, see `RHTState`.
        silent: whether it is of a copy, which nobody need call.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        timeout: timedelta | None,
        given: Topology | None,
        connections: int = 1,
        silent: bool = False,
    ) -> None:
        self.engine: Engine | None = None
        self.failure: str | None = None
        """What the first error said. The error itself would keep frames, and so the state."""
        self.called = silent
        """Whether a bucket came."""
        self.closed = False
        self.bypassed: weakref.ref[DistributedDataParallel] | None = None
        """The model, where the hook does what DDP does without one."""
        self.given = given
        self.number = 0 if given is None else users.number(given.carriers())
        """Among the users of a communicator that is not the hook's alone."""
        self._process_group, self._timeout = process_group, timeout
        self._connections = connections
        self._averages_over: list[int] | None = None  # ranks of the first model, where known
        self._seen = WeakTensorKeyDictionary()  # the parameters of models that were looked at

    def say_that_a_copy_has_none(self) -> None:
        if self.given is not None:
            _log.warning(
                "a copy of an RHTState has no communicator: where it is registered, it exchanges "
                "over the model's process group; make a new RHTState to give it another one"
            )

    def place(self, find: Callable[[], dist.ProcessGroup | None]) -> tuple[int, int] | None:
        """Rank and world size, where they are known; `find` looks for the model's group."""
        topology = self.given if self.engine is None else self.engine.topology
        if topology is not None:
            return topology.rank, topology.world_size
        if not dist.is_initialized():
            return None
        group = self._process_group or find()
        return dist.get_rank(group), dist.get_world_size(group)

    # Models -------------------------------------------------------------------------------------

    def knows(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether the model that a bucket is of was looked at."""
        return bool(parameters) and parameters[0] in self._seen

    def learn(self, parameters: Sequence[torch.Tensor]) -> None:
        for parameter in parameters:
            self._seen[parameter] = True

    def check_group(self, of_model: dist.ProcessGroup) -> None:
        """Raise ValueError unless its model, or all of them, average over the state's ranks."""
        ranks, before = ranks_of(of_model), self._averages_over
        if before not in (None, ranks):
            raise ValueError(
                f"RHTState: it was registered on a model that averages over {before}, and now "
                f"on one that averages over {ranks}; give each model its own state"
            )
        self._averages_over = ranks  # not the group, which would not end before the state
        check_ranks(ranks, self._process_group, self.given)

    def check_open(self) -> None:
        """Raise RuntimeError if the state was closed."""
        if self.closed:
            raise RuntimeError("rht_hook: its RHTState was closed; make a new one and register it")

    # Beginning ----------------------------------------------------------------------------------

    def start(
        self, device: torch.device, of_model: dist.ProcessGroup | None, make: MakeEngine
    ) -> Engine:
        """Make connections and the engine; all ranks call it alike, before or at the first bucket.

        Args:
            device: of the buckets.
            of_model: the group of the DDP model, where it is known.
            make: the engine for a topology, the state's number among its users, and the device.

        Raises:
            RuntimeError: it failed before, or another rank did not come.
        """
        if self.failure is not None:
            raise RuntimeError(f"rht_hook: it failed before: {self.failure}")
        try:
            return self._connect(device, of_model, make)
        except BaseException as error:
            self.failure = text_of(error)  # what began together cannot begin again on one rank
            if not isinstance(error, RuntimeError) or not dist.is_initialized():
                raise
            cause = cause_of(error, self._patience, agreed=False)
            self.failure = (
                f"rht_hook: rank {dist.get_rank()} of {dist.get_world_size()} could not connect "
                f"to the others: {cause}. The transport says: {error}"
            )
            raise RuntimeError(self.failure) from error

    def _connect(
        self, device: torch.device, of_model: dist.ProcessGroup | None, make: MakeEngine
    ) -> Engine:
        group = of_model or self._process_group
        topology = connect(device, group, self.given, self._timeout, self._connections)
        if self.given is None and not topology.private:
            self.number = users.number(topology.carriers())
        self.engine = make(topology, self.number, device)
        return self.engine

    @property
    def _patience(self) -> str:
        """How long exchanges wait, in words."""
        if self._timeout is not None:
            return f"its timeout of {self._timeout.total_seconds():g} s"
        return "its timeout" if self.given is None else self.given.patience

    # The end ------------------------------------------------------------------------------------

    def fail(
        self,
        failure: BaseException,
        device: torch.device,
        of_model: dist.ProcessGroup | None,
        make: MakeEngine,
    ) -> None:
        """Tell the other ranks of a failure that comes before the engine has the bucket.

        They wait for it, or in their first step for this rank to connect.
        """
        if self.engine is None and self.failure is None:
            with contextlib.suppress(Exception):
                self._connect(device, of_model, make)
        self.failure = self.failure or text_of(failure)
        if self.engine is not None:
            self.engine.fail(failure)
            if self.closed:
                self.engine.close()

    def close(self, wait: bool = True) -> None:
        """End the engine, once; warn where no bucket came, but should have, and nothing failed."""
        if self.closed:
            return
        self.closed = True
        if self.engine is not None:
            self.engine.close(wait)
        failed = self.failure or (self.engine and self.engine.failure)
        if not self.called and not failed and _world_size() > 1:
            warnings.warn(
                "the hook was never called: no gradient reached it, so gradients were averaged "
                "uncompressed, or not at all; register it on the model that trains "
                "(rhtcomm.hooks.register(model), or compress_fsdp(model))",
                stacklevel=4,
            )

    def close_late(self) -> None:
        """Of a state that nobody closed, when it goes or the program ends."""
        at_exit = not threading.main_thread().is_alive()
        if self.engine is None and not at_exit:
            return
        late = at_exit and self.engine is not None and not dist.is_initialized()
        # The garbage collector calls this on any thread, even one that is starting and holds
        # Python's lock of all threads, which the end of the worker takes too. A worker without a
        # state is idle.
        self.close(wait=False)
        if late:
            warnings.warn(
                "an RHTState was still open when torch.distributed ended; call its close() before "
                "torch.distributed.destroy_process_group()",
                ResourceWarning,
                stacklevel=1,
            )


def _world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE") or 1)
