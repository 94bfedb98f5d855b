"""The communication hooks that the trainer compares, and how their time is measured.

Communication is timed in the same way for all hooks. A bucket's interval lasts from the call of its
hook until its future completes. A step's `comm_seconds` is the length of the union of these
intervals on rank 0: encoding, waiting for slower ranks, the exchange and decoding, even if hidden
by the backward pass. `exposed_seconds` is the part that is not hidden: from the last call of the
hook in a step, when all gradients are ready, until the backward pass returns.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

Hook = Callable[[Any, Any], torch.futures.Future[Tensor]]
Moment = float | torch.cuda.Event  # seconds, or a CUDA event


class MeasuredHook:
    """A communication hook that also records when each bucket was submitted and completed."""

    def __init__(self, hook: Hook, device: torch.device) -> None:
        self._hook = hook
        self._device = device
        self._intervals: list[tuple[Moment, Moment]] = []
        self.last_call: Moment | None = None

    def now(self) -> Moment:
        """On CUDA, an event of the current stream, since the host runs ahead of it."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def hook(
        self,
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        start = self.last_call = self.now()

        def finish(future: torch.futures.Future[Tensor]) -> Tensor:
            self._intervals.append((start, self.now()))
            return future.value()

        # DDP waits for the future returned by `then`, so no interval of a step is missing at its
        # end.
        return self._hook(state, bucket).then(finish)

    def take_seconds(self, origin: Moment) -> float:
        """Seconds with a bucket in flight since the last call; `origin` is any earlier moment."""
        intervals = [(elapsed(origin, a), elapsed(origin, b)) for a, b in self._intervals]
        self._intervals.clear()
        return union_length(intervals)


def elapsed(start: Any, end: Any) -> float:
    """Seconds between two moments; those of CUDA must have passed on the device."""
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000
    return float(end - start)


def union_length(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals, which may overlap."""
    length, covered = 0.0, -math.inf
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return length


def make_hook(args: argparse.Namespace) -> tuple[Any, Hook]:
    """State and hook for `register_comm_hook`: the trainer wraps its clock around a hook.

    Without the clock, `rhtcomm.hooks.register(model, ...)` suffices.
    """
    if args.hook == "none":
        return None, default_hooks.allreduce_hook
    if args.hook == "bf16":
        return None, default_hooks.bf16_compress_hook
    if args.hook == "fp16":
        return None, default_hooks.fp16_compress_hook
    if args.hook == "powersgd":
        # With more than one bucket it hangs on Gloo: set --bucket-cap-mb to hold the whole model.
        low_rank = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=args.powersgd_rank, start_powerSGD_iter=10
        )
        return low_rank, powerSGD_hook.powerSGD_hook
    import rhtcomm.hooks  # the other hooks train without the package

    state = rhtcomm.hooks.RHTState(
        bits=args.bits,
        quantizer=args.quantizer,
        exact_fraction=args.exact_fraction,
        rotations=args.rotations,
        algorithm=args.algorithm,
        error_feedback=args.error_feedback,
        warmup_steps=args.hook_warmup,
        seed=args.seed,
        communicator=rhtcomm.MPICommunicator() if args.communicator == "mpi" else None,
        connections=args.connections,
        observer=rhtcomm.hooks.telemetry.csv(args.telemetry) if args.telemetry else None,
    )
    return state, rhtcomm.hooks.rht_hook


def bytes_of_step(args: argparse.Namespace, state: Any, parameters: int, world_size: int) -> int:
    """Bytes that a rank sends in a step of a hook other than rht."""
    itemsize = 2 if args.hook in ("fp16", "bf16") else 4
    if args.hook == "powersgd" and state.iter > state.start_powerSGD_iter:
        # The state counts the bytes of all its steps since the first compressed one.
        steps = round(state.total_numel_before_compression / parameters)
        parameters = round(state.total_numel_after_compression / steps)
    return ring_bytes(parameters, itemsize, world_size)


def ring_bytes(numel: int, itemsize: int, world_size: int) -> int:
    """Bytes that a rank sends in a ring all-reduce."""
    return round(2 * (world_size - 1) / world_size * numel * itemsize)
