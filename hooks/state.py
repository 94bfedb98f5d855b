"""The hook's state: its configuration, where in the run it is, and what a checkpoint holds."""

import contextlib
import copy
import weakref
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..arguments import check_bool, natural
from ..communicators import Topology
from ..randomness import Key
from ..reduce import Algorithm, Reducer, check_algorithm
from . import checkpoint
from .buckets import Bucket, floats_in, plain_mean, say_if_exact
from .configuration import Quantizer, codec_for, most_bits
from .connect import check_communicator
from .engines import Engine, Future, engine_for
from .layout import Layout
from .models import group_of_model, named_parameters
from .policy import Bits, Exclude, Policy
from .residuals import Residuals
from .scales import Scales, read_scales
from .session import Session
from .telemetry import Stats, Totals

__all__ = ["RHTState"]


class RHTState:
    """Configuration and progress of `rht_hook`, of one model; give all ranks the same arguments.

    `rhtcomm.hooks.register` makes one, registers it and looks after it.

    Args:
        bits: bits per coordinate, 1 to 8 ("vector": 1, 2 or 4; "ecdq": 1, 1.25, 1.5, ..., 6); or a
            function of the list of parameters in a bucket that returns them, called once for each
            bucket.
        quantizer: "quic_fl" or "ecdq" (unbiased whatever the input; "ecdq" with half the error at
            4 bits), "eden" (smaller error for one sender; decoding takes an inverse rotation per
            rank), "vector" (as "eden", smaller still, three rotations and the slowest), or
            "lattice" (codes that are added on the way by one integer all-reduce).
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
            found.
        timeout: how long a rank waits for the others before it raises, where the hook makes
            connections of its own (Gloo). By default what torch takes (30 minutes for Gloo),
            whatever the other group has.
        communicator: takes the place of process_group and timeout: an `MPICommunicator`, a
            `HierarchicalCommunicator`, or a `TorchCommunicator`. Of what is on Gloo the hook uses
            the ranks and the timeout, and makes connections of its own; states that were given
            the same one begin in one order on all ranks, or all raise. Any other communicator
            that makes the host wait (MPI) serves one state at a time: a second one that needs it
            in the same backward pass raises a RuntimeError.
        error_feedback: add to each gradient what this rank could not send of it before
            (see `rhtcomm.all_reduce`). It costs float32 memory of the gradients' size and a decode
            of the rank's own payload; "eden" and "vector" then take the biased scale of least
            squared error. Not for "lattice", nor for "quic_fl" with 1 bit. The quantizers are
            unbiased without it, which with AdamW and 1 bit did better than feedback, whose
            errors come back later: compare the two on your model. Residuals have the unit
            of the gradients: after a GradScaler changes its scale, what is left from the step
            before counts by the old one.
        warmup_steps: in so many steps at the beginning of a run, payloads have `warmup_bits` per
            coordinate, where `bits` is less. Gradients are largest then, and Adam's mean of their
            squares remembers the noise of the first steps for about 1000 steps, in which it takes
            too small steps where gradients are small. 0: none.
        warmup_bits: by default 8, or the most that the quantizer has; 32: uncompressed.
        exclude: names of parameters, as shell patterns such as "*.bias", or a function of a
            parameter that returns whether it travels exactly, as float32 within its bucket.
        equalize: for Adam, where gradients differ in size between rows, columns or parameters:
            mean = s decode(encode(x / s)), with powers of two s that follow these sizes. Unbiased;
            noise is proportional to s; a coordinate that was quiet and suddenly is large adds up to
            2^12 times as much to the error of its block. Not for float16. It takes half to
            three quarters of the codec's time (CPU) in addition. See `rhtcomm.hooks.scales`.
        nmse_every: measure the error of the mean in every so many steps (0: never), by an exact
            all-reduce in addition to the compressed one. Its bytes and time are not counted.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.
    """

    def __init__(
        self,
        bits: Bits = 4,
        *,
        quantizer: Quantizer = "quic_fl",
        rotations: int | Literal["auto"] | None = None,
        block: int = 4096,
        exact_fraction: float = 0.0,
        algorithm: Algorithm = "auto",
        seed: int = 0,
        min_numel: int = 1 << 14,
        process_group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        communicator: Topology | None = None,
        error_feedback: bool = False,
        warmup_steps: int = 64,
        warmup_bits: float | None = None,
        exclude: Exclude = (),
        equalize: bool = False,
        nmse_every: int = 0,
    ) -> None:
        check_communicator(communicator, process_group, timeout, "RHTState")
        self.min_numel = natural(min_numel, "RHTState", "min_numel")
        self.nmse_every = natural(nmse_every, "RHTState", "nmse_every")
        check_bool(error_feedback, "RHTState", "error_feedback")
        check_bool(equalize, "RHTState", "equalize")
        codec = partial(
            codec_for,
            quantizer=quantizer,
            rotations=rotations,
            block=block,
            exact_fraction=exact_fraction,
            error_feedback=error_feedback,
        )
        if warmup_bits is None:
            warmup_bits = most_bits(quantizer)
        self.policy = Policy(bits, codec, warmup_steps, warmup_bits, exclude, "RHTState")
        self.codec = self.policy.codec
        check_algorithm(algorithm, self.codec)
        self.algorithm, self.error_feedback, self._timeout = algorithm, error_feedback, timeout
        self.key = Key(seed)  # of the next bucket, except for its index
        self._last_index = -1
        self.ends: set[int] = set()  # where steps ended, though not with DDP's last bucket
        self._steps = 0
        self.totals = Totals()
        self.wishes: dict[tuple[int, int], int] = {}
        self.residuals = Residuals()
        self.scales = Scales() if equalize else None
        self.layout = Layout()
        self._residuals_of: tuple[int, int] | None = None  # the rank and world size that loaded
        self._begin(Session(process_group, timeout, communicator))

    def _begin(self, session: Session) -> None:
        """As before the first bucket."""
        self._session = session
        # Closes what runs, should the state go without close().
        self._finalizer = weakref.finalize(self, session.close_late)
        self._said: set[torch.dtype] = set()  # in the log

    _LEFT_BEHIND = ("_session", "_finalizer", "_said", "residuals", "scales")

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: a copy has no worker thread, process group or communicator."""
        self._session.say_that_a_copy_has_none()
        kept = [name for name in vars(self) if name not in self._LEFT_BEHIND]
        state = {name: copy.copy(getattr(self, name)) for name in kept}
        state["totals"] = replace(self.totals, rotations=dict(self.totals.rotations))
        scales = None if self.scales is None else self.scales.by_parameter()
        return state | {"residuals": self.residuals.by_parameter(), "scales": scales}

    def __setstate__(self, state: dict[str, Any]) -> None:
        residuals, scales = state.pop("residuals"), state.pop("scales")
        vars(self).update(state)
        self.residuals = Residuals()
        self.residuals.replace(residuals)
        self.scales = None if scales is None else Scales(scales)
        self._last_index = -1  # wherever in a step it was copied
        self._begin(Session(None, self._timeout, None, silent=True))

    def __repr__(self) -> str:
        return (
            f"RHTState({self.codec}, algorithm={self.algorithm!r}, "
            f"error_feedback={self.error_feedback}, seed={self.key.seed}, step={self.key.step})"
        )

    @property
    def engine(self) -> Engine | None:
        """What buckets run on, from the first one on."""
        return self._session.engine

    def stats(self) -> Stats:
        """Totals since the state was made: steps begun, and the rest of buckets that came back."""
        return self.totals.stats(self._steps)

    # Checkpoints --------------------------------------------------------------------------------

    def state_dict(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Plain values with which a resumed run goes on in the same random streams and buckets.

        With error feedback also the residuals, float32 tensors in the parameters' shapes (of
        complex ones as `torch.view_as_real` has them), by the names of the model's parameters, and
        the rank and world size: residuals differ between ranks, so each must keep its own. Those
        of parameters that the model has no longer are left out. With equalize also int32 scales.

        Args:
            model: that the hook is registered on, or what it wraps; for what is saved by name.

        Raises:
            ValueError: the model is missing, or the hook has seen none of its parameters, but
                others.
            PayloadError: on CUDA: an earlier bucket did not hold what it should have.
        """
        if self.engine is not None:
            self.engine.checks.raise_failed(wait=True)
        wishes = [[*bucket, count] for bucket, count in sorted(self.wishes.items())]
        step = self.key.step + (self._last_index >= 0)  # DDP may have left out the last buckets
        state: dict[str, Any] = {"seed": self.key.seed, "step": step, "rotations": wishes}
        state["buckets"] = self.layout.buckets()
        if self.error_feedback:
            state["residuals"] = self.residuals.by_name(model)
            state["rank"], state["world_size"] = self.place() or (None, None)
        if self.scales is not None:
            state["scales"] = self.scales.by_name(model)
        return state

    def load_state_dict(self, state: dict[str, Any], model: nn.Module | None = None) -> None:
        """Go on where `state_dict` was taken; call it on all ranks alike, between steps.

        What it refuses changes nothing.

        Args:
            state: of the same rank, if it holds residuals.
            model: as for `state_dict`.

        Raises:
            ValueError: the model is missing or another one; or the residuals are another rank's; or
                only one of this state and the saved one has error_feedback; or it is no saved
                state.
        """
        saved = checkpoint.read(state, self.codec, self.error_feedback)
        known = read_scales(model, saved.scales) if self.scales is not None else []
        if saved.residuals is not None:
            checkpoint.check_place(saved.place, self.place())
            self.residuals.load(model, saved.residuals)
            self._residuals_of = saved.place
        if self.scales is not None:
            self.scales.replace(known)
        if self.engine is not None:  # before the next bucket the ranks compare what they loaded
            self.engine.agreed = False
        self.layout.load(saved.buckets)
        self.key, self._last_index = saved.key, -1
        self.wishes.clear()
        self.wishes.update(saved.wishes)

    def place(self) -> tuple[int, int] | None:
        """Rank and world size, where they are known."""
        return self._session.place(lambda: group_of_model(self)[0])

    # Buckets ------------------------------------------------------------------------------------

    def submit(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> Future:
        """Queue a bucket; the future completes with its mean over ranks, in the bucket's buffer."""
        session = self._session
        session.called = True
        if session.bypassed is not None:
            return plain_mean(bucket, session.bypassed())
        try:
            session.check_open()
            given = bucket.buffer()
            buffer = floats_in(given, bucket.index())
            parameters = bucket.parameters()
            of_model = None if session.knows(parameters) else self._look_at_model(parameters)
            engine = session.engine or self._start(buffer.device, of_model)
            say_if_exact(buffer.dtype, self._said)
            place = self.layout.place(bucket.index(), bucket.is_last(), parameters)
            key, ends = self._next(place.number, place.last, engine)
            queued = Bucket(buffer, key, parameters, ends, state=self)
            done = engine.submit(place.prepare(queued, self.policy))
        except BaseException as failure:
            self._give_up(bucket, failure)
            raise
        # An exception set on a Python future reaches DDP only when a callback raises it again.
        return done.then(lambda finished: given if given.is_complex() else finished.value())

    def _next(self, index: int, last: bool, engine: Engine) -> tuple[Key, bool]:
        """The key of the bucket of that index, and whether it ends its step."""
        # DDP may leave out a step's last buckets, if no gradient came; randomness must not repeat.
        if index <= self._last_index:
            self.ends.add(self._last_index)
            self._next_step()
        # Payloads say whose they are, unless nobody else can send by the same.
        owner = 0 if engine.topology.private else self._session.number
        key = Key(self.key.seed, self.key.step, index, owner=owner)
        self._last_index = index
        if last:
            self._next_step()
        return key, last or index in self.ends

    def _next_step(self) -> None:
        self.key, self._last_index = replace(self.key, step=self.key.step + 1), -1
        self._steps += 1

    # What the state runs on ---------------------------------------------------------------------

    def _make_engine(self, topology: Topology, number: int, device: torch.device) -> Engine:
        reducer = Reducer(self.codec, topology, self.algorithm, self.min_numel)
        reducer.wishes = self.wishes
        residuals = self.residuals if self.error_feedback else None
        kept = (repr(self), self.totals, residuals, self.nmse_every, self.scales)
        return self._kind_of_engine(device, reducer)(reducer, self._facts(number), *kept)

    def _kind_of_engine(self, device: torch.device, reducer: Reducer) -> type[Engine]:
        return engine_for(device, reducer)

    def _facts(self, number: int) -> dict[str, object]:
        """What the ranks compare; `number` is of the state among the users of a communicator."""
        names = ("algorithm", "min_numel", "nmse_every", "error_feedback")
        return {
            **self.codec.configuration,
            **self.policy.facts,
            **{name: getattr(self, name) for name in names},
            "equalize": self.scales is not None,
            "buckets of the checkpoint": self.layout,
            "states that were given its communicator before it": number,
        }

    def start(self, model: nn.Module, group: dist.ProcessGroup, device: torch.device) -> Engine:
        """Connect the ranks of its model before the first bucket; all ranks call it alike.

        Raises:
            ValueError: the state was told of other ranks, or excludes what the model has not.
            RuntimeError: another rank did not come.
        """
        self._session.check_group(group)
        self._learn(model)
        return self._start(device, group)

    def _start(self, device: torch.device, of_model: dist.ProcessGroup | None) -> Engine:
        engine = self._session.start(device, of_model, self._make_engine)
        ranks = engine.topology
        checkpoint.check_place(self._residuals_of, (ranks.rank, ranks.world_size))
        return engine

    def _look_at_model(self, parameters: list[torch.Tensor]) -> dist.ProcessGroup | None:
        """The group of the model that a bucket is of, when the first of its parameters is seen.

        Raises:
            ValueError: it averages over other ranks than the state was told of, or than a model
                did that the state was registered on before.
        """
        of_model, models = group_of_model(self, parameters)
        if of_model is not None:
            self._session.check_group(of_model)
        for model in models:
            self._learn(model)
        self._session.learn(parameters)
        return of_model

    def _learn(self, model: nn.Module) -> None:
        """The parameters of a model and their names."""
        named = named_parameters(model)
        self._session.learn([*named.values()])
        self.policy.learn(named.items())
        self.layout.learn(model, named)

    def _give_up(self, bucket: Any, failure: BaseException) -> None:
        """Tell the other ranks of a failure that comes before the engine has the bucket."""
        of_model = None
        with contextlib.suppress(ValueError):  # several models, which may be the failure
            of_model, _ = group_of_model(self, bucket.parameters())
        self._session.fail(failure, bucket.buffer().device, of_model, self._make_engine)

    def close(self) -> None:
        """Finish what is in flight, end the worker thread and the hook's own connections.

        For the orderly end of a program: call it before `destroy_process_group`. A state that goes
        with its model is closed as well.

        Raises:
            PayloadError: on CUDA: an earlier bucket did not hold what it should have.
        """
        self._finalizer.detach()
        self._session.close()
        if self.engine is not None and self.engine.failure is None:
            self.engine.checks.raise_failed(wait=True)

    def bypass(self, model: nn.Module) -> None:
        """Have the hook do from now on what DDP does without one."""
        assert isinstance(model, DistributedDataParallel)
        # The model has the group, which must not outlive torch's.
        self._session.bypassed = weakref.ref(model)

    def __enter__(self) -> "RHTState":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
