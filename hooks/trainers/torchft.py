"""torchft: a Manager whose quantized all-reduces use rhtcomm."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
import torch.distributed as dist
from torchft.manager import Manager, _ManagedWork
from torchft.process_group import ProcessGroupWrapper
from torchft.work import _DummyWork

from ...arguments import natural
from ...codec import DTYPES
from ...communicators import TorchCommunicator
from ...randomness import Key
from ...reduce import Algorithm, Reducer, check_algorithm
from ...segments import rows_of
from ..configuration import Quantizer, codec_for
from ..failures import clear_frames
from ..stats import Stats, Totals

__all__ = ["CompressedManager", "compress_manager"]

CALL = "rhtcomm.hooks.trainers.torchft.compress_manager"

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that each quorum has its own seed


def compress_manager(
    manager: Manager,
    bits: float = 4,
    *,
    quantizer: Quantizer = "quic_fl",
    rotations: int | Literal["auto"] | None = None,
    block: int = 4096,
    exact_fraction: float = 0.0,
    algorithm: Algorithm = "auto",
    min_numel: int = 1 << 14,
    seed: int = 0,
) -> "CompressedManager":
    """Make `manager.allreduce(tensor, should_quantize=True)` exchange compressed payloads.

    ``compress_manager(manager, bits=4)``, then ``DiLoCo(manager, ..., should_quantize=True)``; call
    it on all replicas before the first quorum. With ``use_bucketization=True`` DiLoCo exchanges
    many parameters at once instead of one by one.

    Replicas may leave and join: each quorum has its own connections, comparison of arguments and
    random streams, since keys derive from its number, the manager's step and the number of the call
    within the step. An error is reported to the manager, like torchft's own, and the step is
    discarded. Tensors that cannot be compressed (float64, or fewer than `min_numel` coordinates)
    are sent exactly.

    Args:
        manager: over `torchft.ProcessGroupGloo`.
        bits, quantizer, rotations, block, exact_fraction, algorithm, min_numel, seed: see
            `rhtcomm.hooks.RHTState`.

    Raises:
        TypeError: it is not a Manager, or its process group is not on Gloo.
        ValueError: an argument is out of its range.
    """
    if not isinstance(manager, Manager):
        raise TypeError(f"{CALL}: manager={manager!r:.80} must be a torchft.Manager")
    if (
        not isinstance(manager._pg, ProcessGroupWrapper)
        or "gloo" not in manager._pg.getBackendName()
    ):
        raise TypeError(
            f"{CALL}: the manager uses {type(manager._pg).__name__}, but only "
            "torchft.ProcessGroupGloo is supported; create the manager with that"
        )
    codec = codec_for(bits, quantizer, rotations, block, exact_fraction, error_feedback=False)
    check_algorithm(algorithm, codec)
    numel = natural(min_numel, CALL, "min_numel")

    def reducer_over(communicator: TorchCommunicator) -> Reducer:
        return Reducer(codec, communicator, algorithm, numel)

    return CompressedManager(manager, reducer_over, Key(seed).seed)


class CompressedManager:
    """The result of `compress_manager`: figures, and how to undo it."""

    def __init__(
        self, manager: Manager, reducer_over: Callable[[TorchCommunicator], Reducer], seed: int
    ) -> None:
        self._manager, self._reducer_over, self._seed = manager, reducer_over, seed
        self._exact = manager.allreduce
        self._quorum: _Quorum | None = None
        self._step = self._calls = -1
        self._totals, self._steps = Totals(), 0
        manager.allreduce = self._allreduce

    def stats(self) -> Stats:
        """Totals, see `Stats`; `steps` counts the manager's steps, including each attempt."""
        return self._totals.stats(self._steps)

    def remove(self) -> None:
        """Restore the manager's `allreduce`; call it before the manager's `shutdown`."""
        self._manager.allreduce = self._exact
        if self._quorum is not None:
            self._quorum.close(wait=True)
            self._quorum = None

    def _allreduce(
        self,
        tensor: torch.Tensor,
        should_quantize: bool = False,
        reduce_op: Any = dist.ReduceOp.AVG,
    ) -> Any:
        """In place of `torchft.Manager.allreduce`."""
        manager = self._manager
        averages = reduce_op == dist.ReduceOp.AVG
        if not should_quantize or not (averages or reduce_op == dist.ReduceOp.SUM):
            return self._exact(tensor, should_quantize, reduce_op)
        if tensor.dtype not in DTYPES:
            return self._exact(tensor, False, reduce_op)
        if manager.errored():
            return _DummyWork(tensor)
        participants = manager.num_participants()  # waits for the quorum
        if not manager.is_participating():
            tensor.zero_()
        try:
            quorum = self._present()
            # Replicas that do not participate send zeros, which count in the mean.
            factor = quorum.world_size / (participants if averages else 1)
            work = _Work(quorum.send(tensor, self._next_key(quorum), factor, self._totals))
        except Exception as error:
            manager.report_error(error)
            return _DummyWork(tensor)
        managed = _ManagedWork(manager, work, tensor)
        managed.get_future().then(lambda _: tensor)  # so that the manager learns of errors
        return managed

    def _present(self) -> "_Quorum":
        """The current quorum."""
        number = self._manager._quorum_id
        if self._quorum is None or self._quorum.number != number:
            if self._quorum is not None:
                self._quorum.close(wait=False)  # its connections are gone
            group = self._manager._pg
            while isinstance(group, ProcessGroupWrapper):
                group = group.parent
            communicator = _QuorumCommunicator(group, self._manager._timeout)
            self._quorum = _Quorum(number, self._reducer_over(communicator))
            self._step = -1
        return self._quorum

    def _next_key(self, quorum: "_Quorum") -> Key:
        step = self._manager.current_step()
        if step != self._step:
            self._step, self._calls = step, -1
            self._steps += 1
        self._calls += 1
        seed = (self._seed + quorum.number * _GOLDEN) % 2**64
        return Key(seed, step, self._calls)


class _Work(dist.Work):
    """The work object that torchft waits for."""

    def __init__(self, future: torch.futures.Future[torch.Tensor]) -> None:
        super().__init__()
        self._future = future

    def wait(self, timeout: Any = None) -> bool:
        self._future.wait()
        return True

    def get_future(self) -> Any:
        return self._future


class _QuorumCommunicator(TorchCommunicator):
    """The replicas of one quorum, whose group torch.distributed does not know."""

    def __init__(self, group: Any, timeout: Any) -> None:
        self.timeout, self.private = timeout, True
        self._set_up(group, list(range(group.size())))

    def enqueues(self, device: str) -> bool:
        return False

    def abort(self) -> None:  # the manager makes a new group
        return None


class _Quorum:
    """Exchanges of one quorum, in the order of their calls, on a separate thread."""

    def __init__(self, number: int, reducer: Reducer) -> None:
        self.number, self.world_size = number, reducer.topology.world_size
        self._reducer, self._agreed = reducer, False
        self._worker = ThreadPoolExecutor(1, f"rhtcomm quorum {number}")

    def send(
        self, tensor: torch.Tensor, key: Key, factor: float, totals: Totals
    ) -> torch.futures.Future[torch.Tensor]:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._worker.submit(self._run, tensor, key, factor, totals, done)
        return done

    def _run(
        self,
        tensor: torch.Tensor,
        key: Key,
        factor: float,
        totals: Totals,
        done: torch.futures.Future[torch.Tensor],
    ) -> None:
        try:
            self._mean_(tensor.detach(), key, factor, totals)
        except BaseException as error:
            clear_frames(error)  # which hold connections
            if not isinstance(error, Exception):  # futures take no others
                error = RuntimeError(f"{CALL}: {error!r} on the worker thread")
            done.set_exception(error)  # type: ignore[arg-type]
        else:
            done.set_result(tensor)

    def _mean_(self, tensor: torch.Tensor, key: Key, factor: float, totals: Totals) -> None:
        reducer = self._reducer
        if not self._agreed:
            facts = {**reducer.codec.configuration, "algorithm": reducer.algorithm}
            facts |= {"min_numel": reducer.min_numel, "seed": key.seed, "step": key.step}
            reducer.agree(facts, tensor.device)
            self._agreed = True
        flat = tensor.contiguous().view(-1)
        lengths = (flat.numel(),)
        totals.add(
            reducer.mean_(flat, key, lengths=lengths, rows=(rows_of(tensor.shape, flat.numel()),))
        )
        if factor != 1:
            flat.mul_(factor)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))

    def close(self, wait: bool) -> None:
        self._worker.shutdown(wait=wait)  # remaining exchanges fail and report it
