"""One line that compresses the gradients of a model, and what it returns."""

import logging
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..codec import DTYPES
from ..communicators import Topology, TorchCommunicator, backend_of
from ..kernels import cpu, kernel_for, reference
from ..lattice import Lattice
from ..reduce import Reducer
from .ddp import rht_hook
from .engines import Engine
from .models import ddp_in, named_parameters, numel_of
from .policy import Bits
from .state import RHTState
from .telemetry import Stats

__all__ = ["Handle", "register"]

_log = logging.getLogger("rhtcomm")


def register(model: nn.Module, bits: Bits = 4, **options: Any) -> "Handle":
    """Compress the gradients of a DistributedDataParallel model; all ranks call it alike.

    ``handle = rhtcomm.hooks.register(DistributedDataParallel(model), bits=4)``

    It averages over the ranks of the model's own process group, connects them at once, on the
    calling thread, and compares their arguments. The log says on rank 0 what it does (INFO). The
    hook ends with the model; call `close` before `destroy_process_group`.

    Args:
        model: in DistributedDataParallel, or something that wraps such a model: what
            torch.compile, Lightning Fabric or Accelerate return.
        bits: bits per coordinate, 1 to 8 ("ecdq": 1 to 6, in quarters), or a function of a
            bucket's parameters.
        options: of `RHTState`.

    Raises:
        TypeError: the model holds no DistributedDataParallel, or is sharded (FSDP).
        ValueError: it holds several; an option is out of its range or has other ranks.
        RuntimeError: the model has a hook already, or another rank did not come.
        DisagreementError: on all ranks, where their arguments differ.
    """
    ddp = ddp_in(model, "rhtcomm.hooks.register")
    if "process_group" in options:
        raise ValueError(
            "rhtcomm.hooks.register: leave out process_group; it takes the model's own"
        )
    state = RHTState(bits, **options)
    device = _device_of(ddp)
    engine = state.start(ddp, device)
    try:
        engine.agree(state.key, device)
        engine.agreed = False  # a checkpoint may be loaded before the first bucket
        _add_hook(ddp, state)
    except BaseException as failure:
        engine.fail(failure)
        engine.close()
        raise
    if engine.topology.rank == 0:
        _log.info("%s", _summary(ddp, state, engine, device))
    return Handle(ddp, state)


def _add_hook(ddp: DistributedDataParallel, state: RHTState) -> None:
    try:
        ddp.register_comm_hook(state, rht_hook)
    except RuntimeError as error:
        if "once" not in str(error):
            raise
        raise RuntimeError(
            "rhtcomm.hooks.register: the model has a communication hook already, and torch takes "
            "one; make the DistributedDataParallel anew"
        ) from error


class Handle:
    """The hook of one model: its figures, its checkpoint and its end. See `register`."""

    def __init__(self, ddp: DistributedDataParallel, state: RHTState) -> None:
        self.state = state
        self._ddp = weakref.ref(ddp)

    def __repr__(self) -> str:
        return f"Handle({self.state!r})"

    def stats(self) -> Stats:
        """Totals since `register`; see `Stats`."""
        return self.state.stats()

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on where it is; `torch.distributed.checkpoint.Stateful`.

        Plain numbers, and with equalize int32 tensors, which are the same on all ranks. With error
        feedback also this rank's residuals, under a name of its own, so that no rank gets those of
        another one: float32 tensors in the parameters' shapes, zeros where nothing was left unsent
        so far.

        Raises:
            RuntimeError: the model is gone.
            PayloadError: on CUDA: an earlier bucket did not hold what it should have.
        """
        saved = self.state.state_dict(self._model())
        residuals = saved.pop("residuals", None)
        if residuals is None:
            return saved
        del saved["rank"], saved["world_size"]
        everything = {
            name: residuals[name] if name in residuals else _zeros_for(parameter)
            for name, parameter in named_parameters(self._model()).items()
            if parameter.requires_grad
        }
        return saved | {self._own_name(): everything}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; call it on all ranks alike, between steps.

        What it refuses changes nothing.

        Raises:
            ValueError: it is no saved state, has residuals of other ranks alone, or of another
                model; or only one of it and this hook has error feedback.
            RuntimeError: the model is gone.
        """
        saved = dict(state)
        found = [name for name in saved if str(name).startswith(_RESIDUALS)]
        if found and "residuals" not in saved:
            own = self._own_name()
            if self.state.error_feedback and own not in saved:
                raise ValueError(
                    "rhtcomm.hooks.Handle.load_state_dict: residuals differ between ranks, and "
                    f"these are {', '.join(found)}, but this rank needs {own}; give each rank what "
                    'it saved, or begin without: handle.load_state_dict(state | {"residuals": {}})'
                )
            saved["residuals"] = saved.get(own, {})
            saved["rank"], saved["world_size"] = self.state.place() or (None, None)
        self.state.load_state_dict(saved, self._model())

    def remove(self) -> None:
        """Go back to the plain all-reduce, on all ranks alike and between steps; closes the hook.

        torch cannot take a hook back. So it stays registered, and from now on does what DDP does
        without one, with the same result.
        """
        self.close()
        self.state.bypass(self._model())
        place = self.state.place()
        if place is None or place[0] == 0:
            _log.info(
                "rhtcomm: the hook does a plain all-reduce from now on; torch keeps it registered"
            )

    def close(self) -> None:
        """Finish what is in flight, end the worker thread and the hook's own connections.

        Call it before `destroy_process_group`. A hook that goes with its model is closed as well.
        """
        self.state.close()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def _model(self) -> DistributedDataParallel:
        ddp = self._ddp()
        if ddp is None:
            raise RuntimeError("rhtcomm.hooks.Handle: its model is gone; register the new one")
        return ddp

    def _own_name(self) -> str:
        rank, world_size = self.state.place() or (0, 1)
        return f"{_RESIDUALS}{rank} of {world_size}"


_RESIDUALS = "residuals of rank "


def _zeros_for(parameter: torch.Tensor) -> torch.Tensor:
    """A residual of nothing, as `RHTState.state_dict` would have it."""
    shape = (*parameter.shape, 2) if parameter.is_complex() else parameter.shape
    return torch.zeros(shape, dtype=torch.float32)


def _device_of(ddp: DistributedDataParallel) -> torch.device:
    """Of the buckets."""
    return next(p.device for p in ddp.parameters() if p.requires_grad)


def _summary(
    ddp: DistributedDataParallel, state: RHTState, engine: Engine, device: torch.device
) -> str:
    """What the hook does, in one line."""
    topology, codec = engine.topology, str(state.codec)
    if state.policy.by_bucket:
        traffic = "a policy decides bucket by bucket what is compressed, and how"
    else:
        sent, uncompressed = (b / 1e6 for b in _bytes_per_step(ddp, state, engine.reducer))
        traffic = f"a rank sends about {sent:.2f} MB per step instead of {uncompressed:.2f} MB"
        if state.policy.treatment(state.key.step, ()) is not None:
            traffic += f" from step {state.policy.warmup_steps} on"
    return (
        f"rhtcomm: gradients of {topology.world_size} ranks are averaged by {codec}, algorithm "
        f"{state.algorithm!r}, over {_transport(topology, device)}, with "
        f"{_kernels(state, device)}; {traffic}"
    )


def _transport(topology: Topology, device: torch.device) -> str:
    if topology.within is not None:
        within, between = _transport(topology.within, device), _transport(topology.between, device)
        return f"{within} within a node and {between} between nodes"
    if isinstance(topology, TorchCommunicator):
        return "gloo" if topology.private else backend_of(topology.group, device.type)
    return type(topology).__name__


def _kernels(state: RHTState, device: torch.device) -> str:
    if isinstance(state.codec, Lattice):
        return "plain torch"
    kernel = kernel_for(device, state.codec.quantizer)
    if isinstance(kernel, cpu.Library):
        return f"C kernels ({kernel.variant})"
    return "plain torch" if kernel is reference else "Triton kernels"


def _bytes_per_step(
    ddp: DistributedDataParallel, state: RHTState, reducer: Reducer
) -> tuple[float, float]:
    """What a rank sends with and without compression, as if each dtype had one bucket."""
    numel_by_dtype: dict[torch.dtype, int] = {}
    for parameter in ddp.parameters():
        if parameter.requires_grad:
            dtype = parameter.real.dtype
            numel_by_dtype[dtype] = numel_by_dtype.get(dtype, 0) + numel_of(parameter)
    sent = uncompressed = 0.0
    for dtype, numel in numel_by_dtype.items():
        before = reducer.topology.ring_bytes(numel * dtype.itemsize)
        uncompressed += before
        compressed = dtype in DTYPES and numel >= state.min_numel
        sent += reducer.expected_bytes(numel) if compressed else before
    return sent, uncompressed
