"""The communication hook for DistributedDataParallel.

Autograd's thread hands each bucket to one worker thread and goes on with the backward pass; the
worker encodes, exchanges and decodes bucket after bucket in the order in which DDP launched them,
each in chunks (see `rhtcomm.collectives`), over a process group of its own, and completes the
future that DDP waits for. (Collectives issued from a future's callback hang or mix up their data on
Gloo.)
"""

import contextlib
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..codec import AUTO, Codec, DeferredChecks
from ..collectives import (
    Algorithm,
    DisagreementError,
    all_reduce,
    check_agreement,
    check_algorithm,
    check_error_feedback,
)
from ..communicator import Communicator, HierarchicalCommunicator, TorchCommunicator
from ..lattice import Lattice
from ..quantizers import Eden, QuicFL, VectorQuantizer
from ..randomness import Key

__all__ = ["RHTState", "Stats", "rht_hook"]

_EDEN: dict[str, type[Eden] | type[VectorQuantizer]] = {"eden": Eden, "vector": VectorQuantizer}
_LATTICE = "lattice"
# record_function takes longer than all else around a part, whether or not a profiler listens.
_named_range: Any = getattr(
    torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function
)
_NO_HOOK = "or registered no hook, or one with another process_group"


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
        process_group: the group that DDP was given, by default the world. Where DDP has a group,
            it must be given here too, since a hook cannot see it: otherwise all ranks of the world
            are averaged. The hook makes a group of its own with the same ranks.
        timeout: of that group: how long a rank waits for the others before it raises. By default
            what torch takes (30 minutes for Gloo), whatever the other group has.
        communicator: takes the place of process_group and timeout: an `MPICommunicator`, or a
            `HierarchicalCommunicator` (whose groups nothing else may use while the hook does).
            Where a rank fails in the hook but lives on, the hook calls its `abort`: the others
            raise at once if its groups are on Gloo, not the world, and nothing else refers to them;
            else they wait for its timeout.
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
        TypeError: timeout or communicator is of another type.
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
        if isinstance(communicator, (str, dist.ProcessGroup)):
            raise TypeError(
                f"RHTState: communicator={communicator!r} must be an object such as "
                "rhtcomm.MPICommunicator(); a process group goes to process_group"
            )
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
        # Flat float32, in the order of the gradient in its bucket. Keyed by parameter, since DDP
        # puts them into other buckets after the first step.
        self._residuals: dict[torch.Tensor, torch.Tensor] = {}
        self.algorithm = algorithm
        self.min_numel = min_numel
        self.nmse_every = nmse_every
        self.key = Key(seed)  # of the next bucket, but for its index
        self._last_index = -1
        self._ends: set[int] = set()  # where steps ended, though not with DDP's last bucket
        self._process_group, self._timeout = process_group, timeout
        self._communicator = communicator
        self._group: dist.ProcessGroup | None = None  # the one made by _start
        self._worker: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._checks = DeferredChecks()
        self._checked = False
        self._failure: BaseException | None = None
        self._closed = False
        self._steps = self._bytes_sent = self._bytes_uncompressed = 0
        self._seconds = {"encode": 0.0, "exchange": 0.0, "decode": 0.0}
        self._squared_error = self._squared_norm = 0.0
        # "auto": what the ranks want for a bucket, by its index and length: they tell whether it is
        # the bucket of the step before.
        self._wanted: dict[tuple[int, int], int] = {}
        self._taken = {1: 0, 2: 0, 3: 0}

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

        With error feedback also the residuals, flat float32 tensors by the names of the model's
        parameters. They differ between ranks, so each must keep its own.

        Args:
            model: that the hook is registered on, DDP or what it wraps; for error feedback only.

        Raises:
            ValueError: the model is missing, or lacks a parameter that the hook has seen.
            PayloadError: on CUDA: an earlier bucket did not hold what it should have.
        """
        self._checks.raise_failed(wait=True)
        wanted = [[*bucket, count] for bucket, count in sorted(self._wanted.items())]
        state: dict[str, Any] = {"seed": self.key.seed, "step": self.key.step, "rotations": wanted}
        if self.error_feedback:
            named = self._named_parameters(model, "state_dict(model)")
            residuals = {
                name: self._residuals[parameter].clone()  # alone in its memory
                for name, parameter in named.items()
                if parameter in self._residuals
            }
            if len(residuals) < len(self._residuals):
                raise ValueError(
                    f"RHTState.state_dict: the model lacks {len(self._residuals) - len(residuals)} "
                    "of the parameters whose gradients the hook has seen; give the model that it "
                    "is registered on"
                )
            state["residuals"] = residuals
        return state

    def load_state_dict(self, state: dict[str, Any], model: nn.Module | None = None) -> None:
        """Go on where `state_dict` was taken; call it on all ranks alike, between steps.

        Args:
            state: of the same rank, if it holds residuals.
            model: as for `state_dict`; for error feedback only.

        Raises:
            ValueError: the model is missing or another one; or only one of this state and the saved
                one has error_feedback; or it is no saved state.
        """
        if not {"seed", "step"} <= state.keys():
            raise ValueError(
                f"RHTState.load_state_dict: a state has seed and step, but this has {list(state)}; "
                "give what state_dict() returned"
            )
        residuals = state.get("residuals")
        if (residuals is not None) != self.error_feedback:
            raise ValueError(
                f"RHTState.load_state_dict: error_feedback={self.error_feedback}, but what was "
                f"saved has {'no ' * (residuals is None)}residuals; make the state as it was then"
            )
        if residuals is not None:
            named = self._named_parameters(model, "load_state_dict(state, model)")
            for name, residual in residuals.items():
                if name not in named or residual.shape != (named[name].numel(),):
                    raise ValueError(
                        f"RHTState.load_state_dict: the saved residual of {name}, of shape "
                        f"{tuple(residual.shape)}, belongs to no parameter of the model; "
                        "give the model that it was saved for"
                    )
            self._residuals = {
                named[name]: residual.float().cpu() for name, residual in residuals.items()
            }
        self.key, self._last_index = Key(state["seed"], state["step"]), -1
        # What a run with "auto" saved means nothing to a fixed number.
        wanted = state.get("rotations", []) if self.codec.rotations == AUTO else []
        self._wanted = {(index, numel): count for index, numel, count in wanted}

    @staticmethod
    def _named_parameters(model: nn.Module | None, call: str) -> dict[str, torch.Tensor]:
        if model is None:
            raise ValueError(
                f"RHTState: with error_feedback residuals are saved by parameter; call {call}"
            )
        if isinstance(model, DistributedDataParallel):
            model = model.module
        return dict(model.named_parameters())

    def close(self) -> None:
        """Finish what is under way, end the worker thread and destroy the group it used.

        For the orderly end of a program: call it before `destroy_process_group`.
        """
        self._closed = True
        if self._worker is not None:
            self._worker.shutdown(wait=True)
        self._leave_group()
        self._worker = None
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
        if self._closed:
            raise RuntimeError("rht_hook: its RHTState was closed; make a new one and register it")
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise TypeError(
                f"rht_hook: bucket {bucket.index()} is a sparse gradient ({buffer.layout}), which "
                "cannot be rotated; make the layer dense (sparse=False for nn.Embedding)"
            )
        if self._worker is None:
            self._start()
        assert self._worker is not None
        index, last = bucket.index(), bucket.is_last()
        # DDP may leave out a step's last buckets, if no gradient came; randomness must not repeat.
        if index <= self._last_index:
            self._ends.add(self._last_index)
            self._next_step()
        key = Key(self.key.seed, self.key.step, index)
        parameters = bucket.parameters() if self.error_feedback else []
        self._last_index = index
        ends = last or index in self._ends
        if last:
            self._next_step()
        on_device = buffer.device.type != "cpu"
        devices = [buffer.device] if on_device else None
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        ready = torch.cuda.current_stream(buffer.device).record_event() if on_device else None
        self._worker.submit(self._run, buffer, key, parameters, ends, ready, done)
        # An exception set on a Python future reaches DDP only when a callback raises it again.
        return done.then(lambda finished: finished.value())

    def _next_step(self) -> None:
        self.key, self._last_index = replace(self.key, step=self.key.step + 1), -1
        self._steps += 1

    def _start(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"rht_hook: it failed before: {self._failure}")
        if self._communicator is None:
            if not dist.is_initialized():
                raise RuntimeError("rht_hook: torch.distributed is not initialized")
            try:
                self._group = self._make_group()
            except RuntimeError as error:
                self._failure = RuntimeError(
                    f"rht_hook: rank {dist.get_rank()} of {dist.get_world_size()} could not make "
                    f"the hook's process group within {self._patience}: another rank ended, hangs, "
                    f"{_NO_HOOK}; see what it printed. Torch says: {error}"
                )
                raise self._failure from error
            self._communicator = TorchCommunicator(self._group)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rhtcomm")

    def _make_group(self) -> dist.ProcessGroup:
        parent = self._process_group
        if parent is None or parent is dist.group.WORLD:
            group = dist.new_group(timeout=self._timeout)
        else:
            group = dist.new_group(
                dist.get_process_group_ranks(parent),
                timeout=self._timeout,
                backend=dist.get_backend(parent),
                use_local_synchronization=True,
            )
        assert isinstance(group, dist.ProcessGroup)
        return group

    def _leave_group(self) -> None:
        """Destroy the group made by _start; once nothing refers to it, its connections close."""
        if self._group is None:
            return
        if dist.is_initialized():
            with contextlib.suppress(ValueError):  # it went with the world that it was made in
                dist.destroy_process_group(self._group)
        self._group = self._communicator = None

    @property
    def _patience(self) -> str:
        """How long exchanges wait, in words."""
        timeout = self._timeout
        if timeout is None:
            timeout = getattr(self._communicator, "timeout", None)
        return "the default timeout" if timeout is None else f"the timeout of {timeout}"

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
                # The next bucket shows that the others have this one, but after a step a rank may
                # leave. A communicator that was given may be used by others then.
                own = self._group is not None
                if ends and not own:
                    self._settle(key)
                done.set_result(buffer)
                if ends and own:
                    self._settle(key)
        except BaseException as failure:
            self._failure = self._failure or failure
            _clear_frames(failure)  # they hold what refers to the group
            if not isinstance(failure, Exception):  # futures take no others
                failure = RuntimeError(f"rht_hook: {failure!r} on the worker thread")
            if not done.done():
                done.set_exception(failure)  # type: ignore[arg-type]
            # A rank may live on after its error. On Gloo nobody would tell the others, which wait.
            # (NCCL's watchdog does that, and destroying its group might block.)
            if self._communicator is not None:
                self._communicator.abort()
            if self._group is not None and self._group.name() == "gloo":
                self._group = self._communicator = None

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
            }
            with self._exchange(key):
                check_agreement(communicator, facts, buffer.device)
            self._checked = True
        residual = self._gather_residual(parameters, buffer) if self.error_feedback else None
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
            check=False,
            residual=residual,
            settle=False,
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
            parts = residual.split([parameter.numel() for parameter in parameters])
            self._residuals.update(zip(parameters, parts, strict=True))
        self._bytes_sent += communicator.bytes_sent - before
        self._bytes_uncompressed += communicator.ring_bytes(buffer.nbytes)
        if exact is not None:
            error = (buffer.float() - exact).square().sum().item()
            norm = exact.square().sum().item()
            if math.isfinite(error) and math.isfinite(norm):  # not so in steps that a scaler skips
                self._squared_error += error
                self._squared_norm += norm

    def _gather_residual(
        self, parameters: list[torch.Tensor], buffer: torch.Tensor
    ) -> torch.Tensor:
        """What is left of a bucket's gradients, (numel,) float32 in memory of its own."""
        parts = []
        for parameter in parameters:
            part = self._residuals.get(parameter)
            if part is None:
                part = buffer.new_zeros(parameter.numel(), dtype=torch.float32)
            parts.append(part.to(buffer.device))
        return torch.cat(parts)

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
        text = str(error)
        if re.search("timed? ?out|waited", text, re.IGNORECASE):
            cause = (
                f"another rank did not answer within {self._patience}; it hangs, is stopped, "
                "or makes other calls than this one"
            )
        elif re.search("closed by|reset by|broken pipe|not connected", text, re.IGNORECASE):
            cause = "another rank died, or failed and gave up"
        else:
            cause = "another rank may have made another call than this one"
        if not self._checked:
            cause += f", {_NO_HOOK}"
        return RuntimeError(
            f"rht_hook: rank {communicator.rank} of {communicator.world_size} could not "
            f"exchange bucket {key.bucket} of step {key.step}: {cause}. See what the other "
            f"ranks printed first. The transport says: {text}"
        )


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
) -> torch.futures.Future[torch.Tensor]:
    """Mean of a gradient bucket over ranks through compressed payloads.

    Register with ``model.register_comm_hook(RHTState(bits=4), rht_hook)``. Errors on this rank or
    in the exchange come out of ``backward()``, as a RuntimeError whose text holds the original
    (of the next one, if another rank fails after it sent the last of a step);
    after one, the state refuses further buckets. On CUDA, payloads of another step or configuration
    are found out one bucket or more later, as the check waits for nothing.

    A profile has the ranges rhtcomm::encode, ::exchange and ::decode if it sees the worker thread:
    ``profile(experimental_config=_ExperimentalConfig(profile_all_threads=True))``.
    """
    if not isinstance(state, RHTState):
        raise TypeError(
            f"rht_hook: its state is {state!r}, not an RHTState; register it with "
            "model.register_comm_hook(RHTState(bits=4), rht_hook)"
        )
    return state.submit(bucket)
