"""The state of `rht_hook`: how DDP's buckets come to the ranks that average them."""

import contextlib
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .base import HookState
from .buckets import Bucket, floats_in, plain_mean, say_if_exact
from .engines import Engine, Future
from .models import group_of_model, named_parameters

__all__ = ["RHTState"]


class RHTState(HookState):
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
        observer: a function, or a list of functions, that gets a `BucketReport` of each bucket in
            each step; see `rhtcomm.hooks.telemetry` for some. It is called on the thread that
            trains, at the end of the backward pass, and may differ between ranks. One that raises
            is dropped with a warning in the log. `close` closes it if it has a `close`; a copy of
            the state has none.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.
    """

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
            queued.reports = self._new_reports()
            done = engine.submit(place.prepare(queued, self.policy))
        except BaseException as failure:
            self._give_up(bucket, failure)
            raise
        # An exception set on a Python future reaches DDP only when a callback raises it again.
        mean = done.then(lambda finished: given if given.is_complex() else finished.value())
        if self.reports is not None:
            self.reports.follow(queued, mean, engine.cuda)
        return mean

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

    def bypass(self, model: nn.Module) -> None:
        """Have the hook do from now on what DDP does without one."""
        assert isinstance(model, DistributedDataParallel)
        # The model has the group, which must not outlive torch's.
        self._session.bypassed = weakref.ref(model)
