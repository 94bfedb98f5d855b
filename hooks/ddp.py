"""The communication hook for DistributedDataParallel.

Autograd's thread hands each bucket to one worker thread and goes on with the backward pass; the
worker encodes, exchanges and decodes bucket after bucket in the order in which DDP launched them,
each in chunks (see `rhtcomm.collectives`), over a process group of its own, and completes the
future that DDP waits for. (Collectives issued from a future's callback hang or mix up their data on
Gloo.)
"""

import contextlib
import gc
import logging
import math
import operator
import re
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from ..codec import AUTO, DTYPES, Codec, DeferredChecks
from ..collectives import (
    Algorithm,
    DisagreementError,
    all_reduce,
    check_agreement,
    check_algorithm,
    check_error_feedback,
)
from ..communicator import Communicator, HierarchicalCommunicator, TorchCommunicator, users
from ..floating_point import GRAIN, default_mode
from ..lattice import Lattice
from ..quantizers import Eden, QuicFL, VectorQuantizer
from ..randomness import Key, integer
from .residuals import Residuals, numel_of

__all__ = ["RHTState", "Stats", "rht_hook"]

_EDEN: dict[str, type[Eden] | type[VectorQuantizer]] = {"eden": Eden, "vector": VectorQuantizer}
_LATTICE = "lattice"
# record_function takes longer than all else around a part, whether or not a profiler listens.
_named_range: Any = getattr(
    torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function
)
_OF_BUCKETS = ("buffer", "index", "is_last", "parameters")  # what the hook asks them
_NO_HOOK = "or registered no hook, or one with another process_group"
_log = logging.getLogger("rhtcomm")


@dataclass(frozen=True)
class Stats:
    """What the hook has done so far, on this rank.

    Seconds are wall-clock time of the worker thread. Chunks of a bucket travel while others are
    encoded and decoded; `exchange_seconds` is what it waited for beside, without the receipts that
    ranks exchange behind the last result of a step. On CUDA they are the time to launch the work,
    but for exchanges through host memory (Gloo), which wait for the device.
    `bytes_uncompressed` is what a ring all-reduce of the gradients in their own dtype would have
    sent. `nmse` is |mean - exact|^2 / |exact|^2 over the sampled buckets, None if none was.
    `rotations` counts compressed buckets by the number of transforms that they took.
    """

    steps: int
    bytes_sent: int
    bytes_uncompressed: int
    encode_seconds: float
    exchange_seconds: float
    decode_seconds: float
    nmse: float | None
    rotations: dict[int, int]

    @property
    def bytes_saved(self) -> int:
        return self.bytes_uncompressed - self.bytes_sent

    @property
    def compression_ratio(self) -> float:
        return self.bytes_uncompressed / self.bytes_sent if self.bytes_sent else 1.0


class RHTState:
    """Configuration and progress of `rht_hook`, of one model; give all ranks the same arguments.

    Args:
        bits: bits a coordinate, 1 to 8 ("vector": 1, 2 or 4).
        quantizer: "quic_fl" (unbiased whatever the input), or "eden" (smaller error for one
            sender; decoding takes an inverse rotation for each rank), or "vector" (as "eden",
            smaller still, three rotations and the slowest), or "lattice" (codes that are added on
            the way by one integer all-reduce).
        rotations: randomized Hadamard transforms, 1 to 3; by default the quantizer's safe number;
            "auto": 1 for a bucket that needed no more on any rank in the step before, else the safe
            number (see `rhtcomm.choose_rotations`).
        block: coordinates in a block, a power of two.
        exact_fraction: 0 or 1/512, of the coordinates that travel exactly; see `rhtcomm.QuicFL`,
            the only quantizer that has it.
        algorithm: "auto", "all_gather", "two_shot" or "gather", see `rhtcomm.all_reduce`.
        seed: of the random streams.
        min_numel: buckets with fewer coordinates go uncompressed.
        process_group: the group that DDP was given. By default that of the DDP model which the
            state is registered on, found when its first bucket comes; the world, where none is
            found. The hook makes connections of its own between the same ranks.
        timeout: of those: how long a rank waits for the others before it raises. By default what
            torch takes (30 minutes for Gloo), whatever the other group has.
        communicator: takes the place of process_group and timeout: an `MPICommunicator`, a
            `HierarchicalCommunicator`, or a `TorchCommunicator`. Of what is on Gloo the hook uses
            the ranks and the timeout, and makes connections of its own; states that were given
            the same one begin in one order on all ranks, or all raise. Any other communicator
            (MPI, NCCL) serves one state at a time: a second one that needs it in the same backward
            pass raises a RuntimeError.
        error_feedback: add to each gradient what this rank could not send of it before
            (see `rhtcomm.all_reduce`). It costs float32 memory of the gradients' size and a decode
            of the rank's own payload; "eden" and "vector" then take the biased scale of least
            squared error. Not for "lattice", nor for "quic_fl" with 1 bit. The quantizers are
            unbiased without it, which with AdamW and 1 bit did better than feedback, whose
            errors come back later: compare the two on your model. Residuals have the unit
            of the gradients: after a GradScaler changes its scale, what is left from the step
            before counts by the old one.
        nmse_every: measure the error of the mean in every so many steps (0: never), by an exact
            all-reduce beside the compressed one. Its bytes and time are not counted.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        quantizer: Literal["quic_fl", "eden", "vector", "lattice"] = "quic_fl",
        rotations: int | Literal["auto"] | None = None,
        block: int = 4096,
        exact_fraction: float = 0.0,
        algorithm: Algorithm = "auto",
        seed: int = 0,
        min_numel: int = 1 << 14,
        process_group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        communicator: Communicator | HierarchicalCommunicator | None = None,
        error_feedback: bool = False,
        nmse_every: int = 0,
    ) -> None:
        names = ("quic_fl", *_EDEN, _LATTICE)
        if quantizer not in names:
            raise ValueError(f"RHTState: quantizer={quantizer!r} must be one of {', '.join(names)}")
        if communicator is not None and (process_group is not None or timeout is not None):
            raise ValueError(
                "RHTState: a communicator brings its own ranks and timeout; "
                "leave out process_group and timeout"
            )
        if timeout is not None and not isinstance(timeout, timedelta):
            raise TypeError(
                f"RHTState: timeout={timeout!r} must be a datetime.timedelta, such as "
                "timedelta(minutes=5)"
            )
        if timeout is not None and timeout <= timedelta(0):
            raise ValueError(f"RHTState: timeout={timeout!r} must be positive")
        if communicator is not None and not callable(getattr(communicator, "all_reduce_", None)):
            raise TypeError(
                f"RHTState: communicator={communicator!r} must be an object such as "
                "rhtcomm.MPICommunicator(); a process group goes to process_group"
            )
        if isinstance(communicator, type):
            raise TypeError(
                f"RHTState: communicator={communicator!r} is a class; make an object of it"
            )
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"RHTState: process_group={process_group!r} must be a process group, the one that "
                "DistributedDataParallel was given"
            )
        min_numel = integer(min_numel, "RHTState", "min_numel")
        nmse_every = integer(nmse_every, "RHTState", "nmse_every")
        if type(error_feedback) is not bool:
            raise TypeError(f"RHTState: error_feedback={error_feedback!r} must be True or False")
        if min_numel < 0 or nmse_every < 0:
            raise ValueError(
                f"RHTState: min_numel={min_numel} and nmse_every={nmse_every} must not be negative"
            )
        if exact_fraction and quantizer != "quic_fl":
            raise ValueError(
                f"RHTState: exact_fraction={exact_fraction!r} is for quantizer='quic_fl' alone, "
                f"not {quantizer!r}; leave it out"
            )
        self.codec: Codec | Lattice
        if quantizer == _LATTICE:
            if rotations == AUTO:
                raise ValueError(
                    'RHTState: rotations="auto" is not for quantizer="lattice", whose error hangs '
                    "on the largest coordinate; give a number"
                )
            self.codec = Lattice(bits, 2 if rotations is None else rotations, block)
        elif quantizer == "quic_fl":
            self.codec = Codec(QuicFL(bits, exact_fraction), rotations, block)
        else:
            self.codec = Codec(_EDEN[quantizer](bits, biased=error_feedback), rotations, block)
        check_algorithm(algorithm, self.codec)
        if error_feedback:
            check_error_feedback(self.codec)
        self.error_feedback = error_feedback
        self._residuals = Residuals()
        self._residuals_of: tuple[int, int] | None = None  # the rank and world size that loaded
        self.algorithm = algorithm
        self.min_numel = min_numel
        self.nmse_every = nmse_every
        self.key = Key(seed)  # of the next bucket, but for its index
        self._last_index = -1
        self._ends: set[int] = set()  # where steps ended, though not with DDP's last bucket
        self._process_group, self._timeout = process_group, timeout
        self._given = communicator
        # Among the users of a communicator that is not the hook's alone.
        self._number = 0 if communicator is None else users.number(communicator.carriers())
        self._steps = self._bytes_sent = self._bytes_uncompressed = 0
        self._seconds = {"encode": 0.0, "exchange": 0.0, "decode": 0.0}
        self._squared_error = self._squared_norm = 0.0
        # "auto": what the ranks want for a bucket, by its index and length: they tell whether it is
        # the bucket of the step before.
        self._wanted: dict[tuple[int, int], int] = {}
        self._taken = {1: 0, 2: 0, 3: 0}
        self._reset()

    def _reset(self) -> None:
        """As before the first bucket."""
        self._running = _Running()
        # Closes what runs, should the state go without close().
        self._finalizer = weakref.finalize(self, _close_late, self._running)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._checks = DeferredChecks()
        self._checked = False
        self._said: set[torch.dtype] = set()  # in the log
        self._averages_over: list[int] | None = None  # ranks of the first model, where known
        self._seen = WeakTensorKeyDictionary()  # the parameters of models that were looked at
        self._failure: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._unfinished = 0  # buckets
        self._backward: weakref.ref[object] | None = None  # pass that buckets come from

    _LEFT_BEHIND = (
        *("_running", "_finalizer", "_streams", "_checks", "_checked", "_said", "_failure"),
        *("_averages_over", "_seen"),
        *("_closed", "_lock", "_unfinished", "_backward", "_process_group", "_given", "_number"),
        "_residuals",
    )

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: a copy has no worker thread, process group or communicator."""
        if self._given is not None:
            _log.warning(
                "a copy of an RHTState has no communicator: where it is registered, it exchanges "
                "over the model's process group; make a new RHTState to give it another one"
            )
        state = {
            name: value.copy() if isinstance(value, (dict, set)) else value  # for copy.copy
            for name, value in vars(self).items()
            if name not in self._LEFT_BEHIND
        }
        return state | {"residuals": self._residuals.by_parameter()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        residuals = state.pop("residuals")
        vars(self).update(state)
        self._residuals = Residuals()
        self._residuals.replace(residuals)
        self._process_group, self._given, self._number = None, None, 0
        self._last_index = -1  # wherever in a step it was copied
        self._reset()

    @property
    def _communicator(self) -> "Communicator | HierarchicalCommunicator | None":
        """What buckets travel by, from the first one on."""
        return self._running.communicator

    @property
    def _group(self) -> Any:
        """The group whose connections are the hook's own, where it has one."""
        communicator = self._communicator
        own = isinstance(communicator, TorchCommunicator) and communicator.private
        return communicator.group if own else None  # type: ignore[union-attr]

    def __repr__(self) -> str:
        return (
            f"RHTState({self.codec}, algorithm={self.algorithm!r}, "
            f"error_feedback={self.error_feedback}, seed={self.key.seed}, step={self.key.step})"
        )

    def stats(self) -> Stats:
        """Totals since the state was made: steps begun, and the rest of buckets that came back."""
        return Stats(
            steps=self._steps,
            bytes_sent=self._bytes_sent,
            bytes_uncompressed=self._bytes_uncompressed,
            encode_seconds=self._seconds["encode"],
            exchange_seconds=self._seconds["exchange"],
            decode_seconds=self._seconds["decode"],
            nmse=self._squared_error / self._squared_norm if self._squared_norm else None,
            rotations=dict(self._taken),
        )

    def state_dict(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Plain values with which a resumed run goes on in the same random streams.

        With error feedback also the residuals, float32 tensors in the parameters' shapes (of
        complex ones as `torch.view_as_real` has them), by the names of the model's parameters, and
        the rank and world size: residuals differ between ranks, so each must keep its own. Those
        of parameters that the model has no longer are left out.

        Args:
            model: that the hook is registered on, or what it wraps; for error feedback only.

        Raises:
            ValueError: the model is missing, or the hook has seen none of its parameters, but
                others.
            PayloadError: on CUDA: an earlier bucket did not hold what it should have.
        """
        self._checks.raise_failed(wait=True)
        wanted = [[*bucket, count] for bucket, count in sorted(self._wanted.items())]
        state: dict[str, Any] = {"seed": self.key.seed, "step": self.key.step, "rotations": wanted}
        if self.error_feedback:
            state["residuals"] = self._residuals.by_name(_given(model, "state_dict(model)"))
            state["rank"], state["world_size"] = self._place() or (None, None)
        return state

    def load_state_dict(self, state: dict[str, Any], model: nn.Module | None = None) -> None:
        """Go on where `state_dict` was taken; call it on all ranks alike, between steps.

        What it refuses changes nothing.

        Args:
            state: of the same rank, if it holds residuals.
            model: as for `state_dict`; for error feedback only.

        Raises:
            ValueError: the model is missing or another one; or the residuals are another rank's; or
                only one of this state and the saved one has error_feedback; or it is no saved
                state.
        """
        if not isinstance(state, Mapping) or not {"seed", "step"} <= state.keys():
            this = f"has {list(state)}" if isinstance(state, Mapping) else f"is {state!r:.80}"
            raise ValueError(
                f"RHTState.load_state_dict: a state has seed and step, but this {this}; "
                "give what state_dict() returned"
            )
        key = Key(state["seed"], state["step"])
        # What a run with "auto" saved means nothing to a fixed number.
        wanted = state.get("rotations", []) if self.codec.rotations == AUTO else []
        try:
            rows = [[operator.index(number) for number in row] for row in wanted]
            wanted = {(index, numel): count for index, numel, count in rows}
        except (TypeError, ValueError) as error:
            raise ValueError(
                "RHTState.load_state_dict: rotations must hold a bucket's index, its length and a "
                f"count in each row, but this has {wanted!r:.80}; give what state_dict() returned"
            ) from error
        if odd := {*wanted.values()} - {1, 2, 3}:
            raise ValueError(
                f"RHTState.load_state_dict: rotations must be 1, 2 or 3, but this has {odd}; "
                "give what state_dict() returned"
            )
        residuals = state.get("residuals")
        if residuals is not None and not isinstance(residuals, Mapping):
            raise ValueError(
                "RHTState.load_state_dict: residuals must be a dictionary of tensors by name, but "
                f"this has {residuals!r:.80}; give what state_dict() returned"
            )
        if (residuals is not None) != self.error_feedback:
            raise ValueError(
                f"RHTState.load_state_dict: error_feedback={self.error_feedback}, but what was "
                f"saved has {'no ' * (residuals is None)}residuals; make the state as it was then"
            )
        if residuals is not None:
            model = _given(model, "load_state_dict(state, model)")
            place: Any = (state.get("rank"), state.get("world_size")) if residuals else None
            if place is not None:
                self._check_residuals_of(place, self._place())
            self._residuals.load(model, residuals)
            self._residuals_of = place
        self.key, self._last_index, self._wanted = key, -1, wanted

    @staticmethod
    def _check_residuals_of(saved: Any, own: tuple[int, int] | None) -> None:
        if None in saved or (own is not None and saved != own):
            this = "" if own is None else f", but this is rank {own[0]} of {own[1]}"
            raise ValueError(
                "RHTState.load_state_dict: residuals differ between ranks, and these are of rank "
                f"{saved[0]} of {saved[1]}{this}; give each rank what it saved, or begin without: "
                'state["residuals"] = {}'
            )

    def _place(self) -> tuple[int, int] | None:
        """Rank and world size, where they are known."""
        communicator = self._communicator or self._given
        if communicator is not None:
            return communicator.rank, communicator.world_size
        if not dist.is_initialized():
            return None
        group = self._process_group or _group_of_model(self)[0]
        return dist.get_rank(group), dist.get_world_size(group)

    def close(self) -> None:
        """Finish what is under way, end the worker thread and the hook's own connections.

        For the orderly end of a program: call it before `destroy_process_group`. A state that goes
        with its model is closed as well.
        """
        self._closed = True
        self._finalizer.detach()
        self._running.close()
        users.give_back(self)
        if self._failure is None:
            self._checks.raise_failed(wait=True)

    def __enter__(self) -> "RHTState":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        """Queue a bucket; the future completes with its mean over ranks, in the bucket's buffer."""
        try:
            return self._submit(bucket)
        except BaseException as failure:
            self._give_up_before(bucket, failure)
            raise

    def _submit(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        if self._closed:
            raise RuntimeError("rht_hook: its RHTState was closed; make a new one and register it")
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise TypeError(
                f"rht_hook: bucket {bucket.index()} is a sparse gradient ({buffer.layout}), which "
                "cannot be rotated; make the layer dense (sparse=False for nn.Embedding)"
            )
        given = buffer
        if buffer.is_complex():  # torch 2.13 gives pairs of floats itself
            buffer = torch.view_as_real(buffer).view(-1)
        if not buffer.is_floating_point():
            raise TypeError(
                f"rht_hook: bucket {bucket.index()} is {buffer.dtype}, and a mean of integers is "
                "no integer; reduce it with torch.distributed"
            )
        parameters = bucket.parameters()
        known = bool(parameters) and parameters[0] in self._seen
        of_model = None if known else self._check_model(parameters)
        worker = self._running.worker or self._start(bucket, of_model)
        self._take_communicator()
        index, last = bucket.index(), bucket.is_last()
        # DDP may leave out a step's last buckets, if no gradient came; randomness must not repeat.
        if index <= self._last_index:
            self._ends.add(self._last_index)
            self._next_step()
        key = Key(self.key.seed, self.key.step, index, owner=self._owner)
        self._last_index = index
        ends = last or index in self._ends
        if last:
            self._next_step()
        on_device = buffer.device.type != "cpu"
        devices = [buffer.device] if on_device else None
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        ready = torch.cuda.current_stream(buffer.device).record_event() if on_device else None
        with self._lock:
            self._unfinished += 1
        worker.submit(self._run, buffer, key, parameters, ends, ready, done)
        # An exception set on a Python future reaches DDP only when a callback raises it again.
        return done.then(lambda finished: given if given.is_complex() else finished.value())

    def _next_step(self) -> None:
        self.key, self._last_index = replace(self.key, step=self.key.step + 1), -1
        self._steps += 1

    # What the state runs on ---------------------------------------------------------------------

    def _start(self, bucket: Any, of_model: dist.ProcessGroup | None = None) -> ThreadPoolExecutor:
        """Make the worker thread and the connections; the ranks make their first buckets alike."""
        if self._failure is not None:
            raise RuntimeError(f"rht_hook: it failed before: {self._failure}")
        try:
            self._running.communicator = self._connect(bucket.buffer().device.type, of_model)
        except BaseException as error:
            self._failure = error  # what began together cannot begin again on one rank
            if not isinstance(error, RuntimeError) or not dist.is_initialized():
                raise
            self._failure = RuntimeError(
                f"rht_hook: rank {dist.get_rank()} of {dist.get_world_size()} could not make "
                f"the hook's process group: {self._cause(error)}. Torch says: {error}"
            )
            raise self._failure from error
        if self._residuals_of is not None:
            self._check_residuals_of(self._residuals_of, self._place())
        return self._running.start()

    def _connect(
        self, device: str, of_model: dist.ProcessGroup | None
    ) -> "Communicator | HierarchicalCommunicator":
        if self._given is not None:
            return self._given.apart(device)
        group = of_model or self._process_group or dist.group.WORLD
        if group is None:
            raise RuntimeError("rht_hook: torch.distributed is not initialized")
        return TorchCommunicator.of_its_own(group, device, self._timeout)

    def _check_model(self, parameters: Sequence[torch.Tensor]) -> dist.ProcessGroup | None:
        """The group of the model that a bucket is of, when the first of its parameters is seen.

        Raises:
            ValueError: it averages over other ranks than the state was told of, or than a model
                did that the state was registered on before.
        """
        of_model, whole = _group_of_model(self, parameters)
        if of_model is not None:
            ranks, before = _ranks(of_model), self._averages_over
            if before not in (None, ranks):
                raise ValueError(
                    f"RHTState: it was registered on a model that averages over {before}, and now "
                    f"on one that averages over {ranks}; give each model a state of its own"
                )
            self._averages_over = ranks  # not the group, which would not end before the state
            self._check_ranks(of_model)
        for parameter in (*whole, *parameters):
            self._seen[parameter] = True
        return of_model

    def _check_ranks(self, of_model: dist.ProcessGroup) -> None:
        """Raise ValueError if the state was told of other ranks than its model averages over."""
        if self._process_group is not None and _ranks(self._process_group) != _ranks(of_model):
            raise ValueError(
                f"RHTState: process_group has the ranks {_ranks(self._process_group)}, but the DDP "
                f"model that it is registered on averages over {_ranks(of_model)}; leave "
                "process_group out, or give DDP's"
            )
        given: Any = self._given
        if given is None:
            return
        if given.world_size != of_model.size():
            raise ValueError(
                f"RHTState: its communicator has {given.world_size} ranks, but the DDP model that "
                f"it is registered on averages over {of_model.size()}; give one of the same ranks"
            )
        levels = (given.within, given.between) if hasattr(given, "within") else (given,)
        for level in levels:  # MPI has numbers of its own for the ranks
            if isinstance(level, TorchCommunicator) and not {*level.ranks} <= {*_ranks(of_model)}:
                raise ValueError(
                    f"RHTState: its communicator has the ranks {level.ranks}, but the DDP model "
                    f"that it is registered on averages over {_ranks(of_model)}; give one of the "
                    "same ranks"
                )

    @property
    def _owner(self) -> int:
        """What payloads say of whose they are: nothing, where nobody else can send by the same."""
        own = self._communicator is not None and self._communicator.private
        return 0 if own else self._number

    def _take_communicator(self) -> None:
        """Nobody else may send by it until the backward pass and its buckets are finished.

        All ranks see alike who does it within one backward pass, and so raise alike.
        """
        communicator = self._communicator
        if communicator is None or communicator.private or self._backward or self._failure:
            return
        users.take(communicator.carriers(), self)
        with contextlib.suppress(RuntimeError):  # it is none, as with DDP's join()
            end = partial(self._end_backward)
            torch.autograd.Variable._execution_engine.queue_callback(end)
            # A pass that fails calls nothing, but it drops its callbacks.
            self._backward = weakref.ref(end, self._end_backward)

    def _end_backward(self, of: weakref.ref[object] | None = None) -> None:
        if of is None or of is self._backward:
            self._backward = None
            self._give_communicator_back()

    def _finish_bucket(self) -> None:
        with self._lock:
            self._unfinished -= 1
        self._give_communicator_back()

    def _give_communicator_back(self) -> None:
        if not self._backward and not self._unfinished:
            users.give_back(self)

    # Failures -----------------------------------------------------------------------------------

    def _give_up_before(self, bucket: Any, failure: BaseException) -> None:
        """Tell the other ranks of a failure that comes before the worker has the bucket.

        They wait for it, or in their first step for this rank to connect.
        """
        started = self._running.communicator is not None
        if not started and self._failure is None and not self._running.ended:
            with contextlib.suppress(Exception):
                of_model, _ = _group_of_model(self, bucket.parameters())
                self._running.communicator = self._connect(bucket.buffer().device.type, of_model)
        self._failure = self._failure or failure
        worker = self._running.worker
        if worker is None:
            self._abort()
            return
        with contextlib.suppress(RuntimeError):  # the worker has ended
            worker.submit(self._abort)  # behind the buckets before

    def _abort(self) -> None:
        # A rank may live on after its error. On Gloo nobody would tell the others, which wait.
        # (NCCL's watchdog does that, and destroying its group might block.)
        communicator = self._communicator
        if communicator is not None:
            communicator.abort()
            if communicator.private:
                self._running.communicator = None
        users.give_back(self)

    @property
    def _patience(self) -> str:
        """How long exchanges wait, in words."""
        if self._communicator is None and self._timeout is not None:
            return f"its timeout of {self._timeout.total_seconds():g} s"
        communicator = self._communicator or self._given
        return "its timeout" if communicator is None else communicator.patience

    def _run(
        self,
        buffer: torch.Tensor,
        key: Key,
        parameters: list[torch.Tensor],
        ends: bool,
        ready: torch.cuda.Event | None,
        done: torch.futures.Future[torch.Tensor],
    ) -> None:
        """One bucket, on the worker thread."""
        try:
            if self._failure is not None:
                # The other ranks are at an unknown place by now, so the first error ends it.
                raise RuntimeError(
                    f"rht_hook: an earlier bucket failed: {self._failure}"
                ) from self._failure
            self._checks.raise_failed()
            with self._after(buffer, ready), self._checks.deferring():
                self._mean(buffer, key, parameters)
                assert self._communicator is not None
                # The next bucket shows that the others have this one, but after a step a rank may
                # leave. What is not the hook's alone may be used by others then.
                own = self._communicator.private
                if ends and not own:
                    self._settle(key)
                self._finish_bucket()
                done.set_result(buffer)
                if ends and own:
                    self._settle(key)
        except BaseException as failure:
            self._failure = self._failure or failure
            _clear_frames(failure)  # they hold what refers to the group
            if not isinstance(failure, Exception):  # futures take no others
                failure = RuntimeError(f"rht_hook: {failure!r} on the worker thread")
            self._abort()
            if not done.done():
                done.set_exception(failure)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _after(self, buffer: torch.Tensor, ready: torch.cuda.Event | None) -> Iterator[None]:
        """On CUDA, run on a side stream behind what autograd has queued so far."""
        if ready is None:
            yield
            return
        stream = self._side_stream(buffer.device)
        stream.wait_event(ready)
        buffer.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _mean(self, buffer: torch.Tensor, key: Key, parameters: list[torch.Tensor]) -> None:
        communicator = self._communicator
        assert communicator is not None
        if not self._checked:
            facts = {
                **self.codec.configuration,
                "algorithm": self.algorithm,
                "min_numel": self.min_numel,
                "nmse_every": self.nmse_every,
                "error_feedback": self.error_feedback,
                "seed": key.seed,
                "step": key.step,
                "rotations by bucket": sorted(self._wanted.items()),
                "states that were given its communicator before it": self._number,
            }
            with self._exchange(key):
                check_agreement(communicator, facts, buffer.device)
            self._checked = True
        if buffer.dtype not in DTYPES:
            self._mean_exactly(buffer, key)
            return
        residual = self._residuals.gather(parameters, buffer) if self.error_feedback else None
        exact = None
        if self.nmse_every and key.step % self.nmse_every == 0:
            exact = buffer.float() / communicator.world_size
            if residual is not None:
                exact += residual / communicator.world_size
            with self._exchange(key):
                communicator.all_reduce_(exact)
        before = communicator.bytes_sent
        place = (key.bucket, buffer.numel())
        rotations = self._wanted.get(place)
        wanted = all_reduce(
            buffer,
            self.codec,
            key,
            communicator,
            algorithm=self.algorithm,
            min_numel=self.min_numel,
            rotations=rotations,
            segments=[numel_of(parameter) for parameter in parameters],
            check=False,
            residual=residual,
            settle=False,
            user=self,
            stopwatch=lambda part: _Stopwatch(
                part, self._seconds, lambda e: self._explained(e, key)
            ),
        )
        if wanted is not None:
            self._wanted[place] = wanted
        # A node's own ranks exchange full precision.
        links = (
            communicator.between
            if isinstance(communicator, HierarchicalCommunicator)
            else communicator
        )
        if buffer.numel() >= self.min_numel and links.world_size > 1:
            self._taken[rotations or self.codec.default_rotations] += 1
        if residual is not None:
            self._residuals.keep(parameters, residual)
        self._bytes_sent += communicator.bytes_sent - before
        self._bytes_uncompressed += communicator.ring_bytes(buffer.nbytes)
        if exact is not None:
            error = (buffer.float() - exact).square().sum().item()
            norm = exact.square().sum().item()
            if math.isfinite(error) and math.isfinite(norm):  # not so in steps that a scaler skips
                self._squared_error += error
                self._squared_norm += norm

    def _mean_exactly(self, buffer: torch.Tensor, key: Key) -> None:
        """Of what is never rounded: float64, in its own dtype."""
        communicator = self._communicator
        assert communicator is not None
        if buffer.dtype not in self._said:
            self._said.add(buffer.dtype)
            _log.warning(
                "rht_hook: gradients of %s travel as they are, since only float32, bfloat16 and "
                "float16 are compressed",
                buffer.dtype,
            )
        before = communicator.bytes_sent
        with self._exchange(key), default_mode(pool=buffer.numel() > GRAIN):
            communicator.all_reduce_(buffer)
            buffer /= communicator.world_size
        self._bytes_sent += communicator.bytes_sent - before
        self._bytes_uncompressed += communicator.ring_bytes(buffer.nbytes)

    def _settle(self, key: Key) -> None:
        assert self._communicator is not None
        with self._exchange(key):
            self._communicator.settle()

    @contextlib.contextmanager
    def _exchange(self, key: Key) -> Iterator[None]:
        """Explains errors, as the stopwatch does, of what is not timed."""
        try:
            yield
        except DisagreementError:
            raise
        except (RuntimeError, TimeoutError) as error:
            raise self._explained(error, key) from error

    def _explained(self, error: Exception, key: Key) -> RuntimeError:
        """What an error of the exchange of a bucket means."""
        communicator = self._communicator
        assert communicator is not None
        return RuntimeError(
            f"rht_hook: {communicator.name_of(communicator.rank)} of {communicator.world_size} "
            f"could not exchange bucket {key.bucket} of step {key.step}: {self._cause(error)}. "
            f"The transport says: {error}"
        )

    def _cause(self, error: Exception) -> str:
        """What the transport's error means."""
        if re.search("timed? ?out|waited", str(error), re.IGNORECASE):
            cause = (
                f"another rank did not answer within {self._patience}; it hangs, is stopped, or "
                "makes other calls than this one"
            )
        elif re.search("closed by|reset by|broken pipe|not connected", str(error), re.IGNORECASE):
            cause = "another rank died, or failed and gave up"
        else:
            cause = "this rank failed, or another one made another call than this one"
        if not self._checked:
            cause += f", {_NO_HOOK}"
        return f"{cause}. See what the other ranks printed first"


@dataclass
class _Running:
    """What must be ended when a state goes. It refers to no state, which could not go then."""

    worker: ThreadPoolExecutor | None = None
    communicator: "Communicator | HierarchicalCommunicator | None" = None
    ended: bool = False
    """Whether there was a worker, and is none any more."""
    _thread: list[int] = field(default_factory=list)

    def start(self) -> ThreadPoolExecutor:
        self.worker = worker = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="rhtcomm",
            initializer=lambda: self._thread.append(threading.get_ident()),
        )
        return worker

    def close(self, wait: bool = True) -> None:
        """End the worker and, with `wait`, wait for that; leave connections of the hook's own."""
        worker, self.worker = self.worker, None
        if worker is not None:
            self.ended = True
            worker.shutdown(wait=wait and threading.get_ident() not in self._thread)
        communicator = self.communicator
        levels = isinstance(communicator, HierarchicalCommunicator)  # which may differ in it
        if communicator is not None and (levels or communicator.private):
            self.communicator = None
            communicator.close()


def _close_late(running: _Running) -> None:
    """Of a state that nobody closed, when it goes or the program ends."""
    at_exit = not threading.main_thread().is_alive()
    late = at_exit and running.communicator is not None and not dist.is_initialized()
    # The garbage collector calls this on any thread, even one that is starting and holds Python's
    # lock of all threads, which the end of the worker takes too. A worker without a state is idle.
    running.close(wait=False)
    if late:
        warnings.warn(
            "an RHTState was still open when torch.distributed ended; call its close() before "
            "torch.distributed.destroy_process_group()",
            ResourceWarning,
            stacklevel=1,
        )


def _group_of_model(
    state: RHTState, parameters: Sequence[torch.Tensor] = ()
) -> tuple[dist.ProcessGroup | None, list[torch.Tensor]]:
    """The process group of the DDP model that a state is registered on, where it can be found, and
    the model's parameters.

    DDP tells its hook nothing of its group. So look for the model that has the state, or (if the
    state is inside another one) the first parameter, once, when the first bucket comes.

    Raises:
        ValueError: there are several, and they average over other ranks.
    """

    def find() -> list[DistributedDataParallel]:
        pairs = [pair for pair in gc.get_referrers(state) if type(pair) is tuple]
        mine = [model for pair in pairs for model in _models_with(pair, "_comm_hooks")]
        return mine or _models_with(parameters[0], "_module_parameters") if parameters else mine

    mine = find()
    if not mine and gc.get_freeze_count():  # after gc.freeze() they are hidden
        gc.unfreeze()
        mine = find()
        gc.freeze()
    groups = [group for model in mine if (group := getattr(model, "process_group", None))]
    if any(group is not groups[0] and _ranks(group) != _ranks(groups[0]) for group in groups):
        raise ValueError(
            f"RHTState: it is registered on models that average over {_ranks(groups[0])} and over "
            "other ranks; give each model a state of its own"
        )
    return groups[0] if groups else None, [p for model in mine for p in model.parameters()]


def _models_with(thing: object, name: str) -> list[DistributedDataParallel]:
    """Those that have a thing in their list of that name.

    Not from gc.get_objects(): tensors that are about to go must not be referred to (torch 2.9).
    """
    found = []
    for holder in gc.get_referrers(thing):
        if type(holder) is not list:
            continue
        owners = gc.get_referrers(holder)
        owners += [
            one for owner in owners if type(owner) is dict for one in gc.get_referrers(owner)
        ]
        found += [
            owner
            for owner in owners
            if issubclass(type(owner), DistributedDataParallel)
            and getattr(owner, name, None) is holder
        ]
    return found


def _ranks(group: dist.ProcessGroup | None) -> list[int]:
    return dist.get_process_group_ranks(group)


def _given(model: nn.Module | None, call: str) -> nn.Module:
    if model is None:
        raise ValueError(
            f"RHTState: with error_feedback residuals are saved by parameter; call {call}"
        )
    return model


class _Stopwatch:
    """Times a part of a bucket's way, names it in profiles, and explains errors of its exchange."""

    def __init__(
        self, part: str, seconds: dict[str, float], explained: Callable[[Exception], Exception]
    ) -> None:
        self._part, self._seconds, self._explained = part, seconds, explained
        self._range = _named_range(f"rhtcomm::{part}")

    def __enter__(self) -> None:
        self._range.__enter__()
        self._start = time.perf_counter()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._seconds[self._part] += time.perf_counter() - self._start
        self._range.__exit__(kind, error, trace)
        if self._part == "exchange" and isinstance(error, (RuntimeError, TimeoutError)):
            raise self._explained(error) from error


def _clear_frames(error: BaseException | None) -> None:
    """Forget the local variables in the tracebacks of an error and of those that it came from."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def rht_hook(
    state: RHTState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
    *others: Any,
) -> torch.futures.Future[torch.Tensor]:
    """Mean of a gradient bucket over ranks through compressed payloads.

    Register with ``model.register_comm_hook(RHTState(bits=4), rht_hook)``. Errors on this rank or
    in the exchange come out of ``backward()``, as a RuntimeError whose text holds the original
    (of the next one, if another rank fails after it sent the last of a step);
    after one, the state refuses further buckets. On CUDA, payloads of another step or configuration
    are found out one bucket or more later, as the check waits for nothing.

    A profile has the ranges rhtcomm::encode, ::exchange and ::decode if it sees the worker thread:
    ``profile(experimental_config=_ExperimentalConfig(profile_all_threads=True))``.

    Raises:
        TypeError: the state is none, or the caller is not DistributedDataParallel.
    """
    if not isinstance(state, RHTState):
        raise TypeError(
            f"rht_hook: its state is {state!r}, not an RHTState; register it with "
            "model.register_comm_hook(RHTState(bits=4), rht_hook)"
        )
    if others or not all(hasattr(bucket, name) for name in _OF_BUCKETS):
        kind = type(bucket).__name__
        raise TypeError(
            f"rht_hook: it was called with a {kind} in place of a GradBucket. It is for "
            "DistributedDataParallel alone, not for FullyShardedDataParallel, nor for DDP under "
            "compiled autograd's Python reducer: wrap the model in DistributedDataParallel, and "
            'leave torch._dynamo.config.optimize_ddp at its default (not "python_reducer")'
        )
    return state.submit(bucket)
