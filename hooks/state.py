"""The state of `rht_hook`, which submits DDP's buckets to the engine."""

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
    """Configuration and progress of `rht_hook` for one model, with the same arguments on all ranks.

    `rhtcomm.hooks.register` creates, registers and manages one.

    Args:
        bits: bits per coordinate, 1 to 8 ("vector": 1, 2 or 4; "ecdq": 1, 1.25, 1.5, ..., 6); or a
            function of the list of parameters in a bucket that returns them, called once for each
            bucket.
        quantizer: "quic_fl" or "ecdq" (unbiased for every input; "ecdq" with half the error at 4
            bits), "eden" (smaller error for one sender; decoding needs an inverse rotation per
            rank), "vector" (like "eden", with still smaller error; three rotations, slowest), or
            "lattice" (codes that are summed by one integer all-reduce).
        rotations: randomized Hadamard transforms, 1 to 3; by default the quantizer's safe number;
            "auto": 1 if that sufficed for the bucket on all ranks in the previous step, otherwise
            the safe number (see `rhtcomm.choose_rotations`).
        block: coordinates in a block, a power of two.
        exact_fraction: fraction of the coordinates that are sent exactly, 0 or 1/512, only for
            "quic_fl"; see `rhtcomm.QuicFL`.
        algorithm: "auto", "all_gather", "two_shot" or "gather", see `rhtcomm.all_reduce`.
        seed: of the random streams.
        min_numel: buckets with fewer coordinates are sent uncompressed.
        process_group: the group that was passed to DDP. By default that of the DDP model on which
            the state is registered, found at its first bucket; the world if none is found.
        timeout: how long a rank waits for the others before it raises, if the hook makes private
            connections (Gloo). By default torch's default (30 minutes for Gloo), not that of the
            other group.
        communicator: replaces process_group and timeout: an `MPICommunicator`, a
            `HierarchicalCommunicator`, or a `TorchCommunicator`. On Gloo the hook uses only its
            ranks and timeout, and makes private connections; states with the same communicator
            start in the same order on all ranks, or all raise. Any other communicator that blocks
            the host (MPI) serves one state at a time: a second state that needs it in the same
            backward pass raises a RuntimeError.
        connections: TCP connections to each other rank, for networks between sites, where delay or
            loss limits the speed of one (CPU tensors on Gloo; see `TorchCommunicator`).
        error_feedback: add this rank's earlier compression error to each gradient (see
            `rhtcomm.all_reduce`). It needs float32 memory of the gradients' size (float16: and for
            a copy of a bucket's residual) and a decode of the rank's own payload; "eden" and
            "vector" then use the biased scale of least squared error. Not for "lattice", nor for
            "quic_fl" or "ecdq" with 1 bit. With AdamW and 1 bit it reduced the loss in one test
            problem and increased it in another: compare both on your model.
            Residuals are scaled like the gradients: after a GradScaler changes its scale, the
            residual of the step before still has the old scale.
        warmup_steps: number of first steps of a run whose payloads have `warmup_bits` per
            coordinate, if `bits` is less. Gradients are largest then, and Adam's second moment
            remembers the noise for about 1000 steps, so that steps of small gradients are too
            small. 0: none.
        warmup_bits: by default 8, or the quantizer's maximum; 32: uncompressed.
        exclude: names of parameters, as shell patterns such as "*.bias", or a function of a
            parameter that returns whether it is sent exactly, as float32 within its bucket.
        equalize: for Adam, if gradients differ in size between rows, columns or parameters: mean =
            s decode(encode(x / s)), with powers of two s that follow these sizes. Unbiased; noise
            is proportional to s; a coordinate that was small and suddenly is large adds up to 2^12
            times as much to the error of its block. Not for float16. It makes the codec 1.7 to 2.3
            times as slow (CPU). See `rhtcomm.hooks.scales`.
        nmse_every: interval in steps at which the error of the mean is measured (0: never), by an
            additional exact all-reduce. Its bytes and time are not counted.
        observer: a function, or a list of functions, that gets a `BucketReport` of each bucket in
            each step; see `rhtcomm.hooks.telemetry` for some. It is called on the thread that
            trains, at the end of the backward pass, and may differ between ranks. One that raises
            is dropped with a warning in the log. `close` closes it if it has a `close`; a copy of
            the state has none.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument has another type.
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
        """Connect the ranks of its model before the first bucket; call it on all ranks.

        Raises:
            ValueError: the state was given other ranks, or excludes a parameter that the model does
                not have.
            RuntimeError: another rank did not connect.
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
        """The group of a bucket's model, when the first of its parameters is seen.

        Raises:
            ValueError: its ranks differ from those given to the state, or from those of an earlier
                model of the state.
        """
        of_model, models = group_of_model(self, parameters)
        if of_model is not None:
            self._session.check_group(of_model)
        for model in models:
            self._learn(model)
        self._session.learn(parameters)
        return of_model

    def _learn(self, model: nn.Module) -> None:
        """Learn the parameters of a model and their names."""
        named = named_parameters(model)
        self._session.learn([*named.values()])
        self.policy.learn(named.items())
        self.layout.learn(model, named)

    def _give_up(self, bucket: Any, failure: BaseException) -> None:
        """Tell the other ranks of a failure before the engine has the bucket."""
        of_model = None
        with contextlib.suppress(ValueError):  # several models, which may be the failure
            of_model, _ = group_of_model(self, bucket.parameters())
        self._session.fail(failure, bucket.buffer().device, of_model, self._make_engine)

    def bypass(self, model: nn.Module) -> None:
        """From now on, average like DDP without a hook."""
        assert isinstance(model, DistributedDataParallel)
        # The model refers to the group, which must not outlive torch's.
        self._session.bypassed = weakref.ref(model)
