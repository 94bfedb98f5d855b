"""Our hook in the place of torch's own, and the CPU in the place of its GPUs."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from states import TIMEOUT
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from rhtcomm.hooks import RHTState, rht_hook

BLOCK = 256
VNMSE = 4.392e-5  # of QUIC-FL with 8 bits

# By name of what is in the hook's place: the options of its state. None: a wrong mean instead.
HOOKS: dict[str, dict[str, Any] | None] = {
    "exact": {"min_numel": 1 << 40},  # every bucket travels uncompressed
    "8 bits": {"min_numel": 0, "bits": 8, "block": BLOCK},
    "wrong": None,
}


class OnCPU(TorchFunctionMode):
    """What asks for CUDA gets the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = (args[0], *map(_cpu_for, args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _cpu_for(kwargs["device"])
        return func(*args, **kwargs)


def _cpu_for(device: Any) -> Any:
    number = isinstance(device, int) and not isinstance(device, bool)
    named = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return torch.device("cpu") if number or named else device


@contextlib.contextmanager
def cpu_in_place_of_gpus() -> Iterator[None]:
    nothing = {"set_device": None, "synchronize": None, "manual_seed": None, "current_device": 0}
    to = nn.Module.to
    with contextlib.ExitStack() as stack:
        for name, value in nothing.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        for owner, name, stand_in in (
            (torch.cuda, "device", contextlib.nullcontext),
            (nn.Module, "cuda", lambda module, *_: module),
            (nn.Module, "to", lambda module, *given, **kw: to(module, *map(_cpu_for, given), **kw)),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(OnCPU())
        yield


@dataclass
class Seen:
    """What the hook saw."""

    calls: int = 0
    largest: float = 0.0
    """Norm of a bucket, on any rank."""
    states: list[RHTState] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        """8 standard deviations of a coordinate's error.

        A block's error has the expected square VNMSE |x|^2, and lies evenly on its coordinates.
        """
        return 8 * math.sqrt(VNMSE / BLOCK) * self.largest


_seen = Seen()


def ours(
    state: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """The hook, which also counts."""
    _seen.calls += 1
    if not state.min_numel:
        norm = bucket.buffer().float().norm()
        dist.all_reduce(norm, dist.ReduceOp.MAX)
        _seen.largest = max(_seen.largest, norm.item())
    return rht_hook(state, bucket)


def wrong(
    state: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """A mean of nothing: twice this rank's own gradients."""
    _seen.calls += 1
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer().mul_(2))
    return done


@contextlib.contextmanager
def our_hook(name: str, everywhere: bool) -> Iterator[Seen]:
    """Within it, models get the hook of that name in place of any other; or all models get it."""
    global _seen
    seen = _seen = Seen()
    options = HOOKS[name]
    begin = DistributedDataParallel.__init__
    register = DistributedDataParallel.register_comm_hook

    def take_ours(ddp: Any, *_: Any, **__: Any) -> None:
        if options is None:
            register(ddp, None, wrong)
            return
        seen.states.append(RHTState(**{"warmup_steps": 0, "timeout": TIMEOUT, **options}))
        register(ddp, seen.states[-1], ours)

    def begin_on_cpu(ddp: Any, *args: Any, **given: Any) -> None:
        begin(ddp, *args, **{**given, "device_ids": None, "output_device": None})
        if everywhere and not ddp._comm_hooks:
            take_ours(ddp)

    with (
        mock.patch.object(DistributedDataParallel, "__init__", begin_on_cpu),
        mock.patch.object(
            DistributedDataParallel, "register_comm_hook", register if everywhere else take_ours
        ),
    ):
        try:
            yield seen
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for state in seen.states:
                    with contextlib.suppress(RuntimeError):
                        state.close()
