"""One line that compresses the gradients of a model, and what it returns."""

import logging
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..reduce import Reducer
from .base import HookState
from .ddp import rht_hook
from .models import ddp_in, named_parameters, numel_of
from .policy import Bits
from .state import RHTState
from .stats import Stats, figures
from .summary import log_summary

__all__ = ["Handle", "begin", "register"]

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
        TypeError: the model holds no DistributedDataParallel, or is sharded (see `compress_fsdp`).
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
    begin(state, ddp, ddp.process_group, lambda: _add_hook(ddp, state))
    return Handle(ddp, state)


def begin(
    state: RHTState, model: nn.Module, group: dist.ProcessGroup, add: Callable[[], None]
) -> None:
    """Connect the ranks of a group, compare their arguments, `add` the hook, and say what it does.

    Raises:
        See `register`.
    """
    device = _device_of(model)
    engine = state.start(model, group, device)
    with engine.beginning(state.key, device):
        add()
    log_summary(state, device, _reductions(model, engine.reducer))


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
    """The hook of one model: its figures, its checkpoint and its end.

    See `register` and `compress_fsdp`.
    """

    def __init__(self, model: nn.Module, state: HookState) -> None:
        self.state = state
        self._weak_model = weakref.ref(model)
        self._shown = state.stats()  # what `figures` has told of

    def __repr__(self) -> str:
        return f"Handle({self.state!r})"

    def stats(self) -> Stats:
        """Totals since `register`; see `Stats`."""
        return self.state.stats()

    def figures(self) -> dict[str, float]:
        """What a step took, as means over those since the last call, under names for a logger.

        ``logger.log({"loss": loss} | handle.figures())``. Names begin with "rhtcomm/": `bytes_sent`
        and `encode_seconds`, `exchange_seconds` and `decode_seconds` of this rank and one step;
        `compression_ratio`; and `nmse` of all steps so far, where `nmse_every` asks for it. Empty
        where there was no step.
        """
        before, self._shown = self._shown, self.stats()
        return figures(before, self._shown)

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on where it is; `torch.distributed.checkpoint.Stateful`.

        Numbers, names of parameters by bucket, and with equalize int32 tensors, which are the same
        on all ranks. With error feedback also this rank's residuals, under a name of its own, so
        that no rank gets those of another one: float32 tensors in the parameters' shapes, zeros
        where nothing was left unsent so far.

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

        Args:
            state: what `state_dict` returned, on this rank where it has residuals.

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
        """Go back to plain averaging, on all ranks alike and between steps; closes the hook.

        DDP cannot take a hook back. So it stays registered, and from now on does what DDP does
        without one, with the same result.
        """
        self.close()
        self._bypass()
        place = self.state.place()
        if place is None or place[0] == 0:
            _log.info("rhtcomm: gradients are averaged as they are from now on")

    def _bypass(self) -> None:
        self.state.bypass(self._model())

    def close(self) -> None:
        """Finish what is in flight, end the worker thread, the hook's connections and observers.

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

    def _model(self) -> nn.Module:
        model = self._weak_model()
        if model is None:
            raise RuntimeError("rhtcomm.hooks.Handle: its model is gone; register the new one")
        return model

    def _own_name(self) -> str:
        rank, world_size = self.state.place() or (0, 1)
        return f"{_RESIDUALS}{rank} of {world_size}"


_RESIDUALS = "residuals of rank "


def _zeros_for(parameter: torch.Tensor) -> torch.Tensor:
    """A residual of nothing, as `RHTState.state_dict` would have it."""
    shape = (*parameter.shape, 2) if parameter.is_complex() else parameter.shape
    return torch.zeros(shape, dtype=torch.float32)


def _device_of(model: nn.Module) -> torch.device:
    """Of the buckets."""
    return next(p.device for p in model.parameters() if p.requires_grad)


def _reductions(model: nn.Module, reducer: Reducer) -> list[tuple[Reducer, torch.dtype, int, bool]]:
    """Of a step, as if each dtype had one bucket."""
    numel_by_dtype: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            dtype = parameter.real.dtype
            numel_by_dtype[dtype] = numel_by_dtype.get(dtype, 0) + numel_of(parameter)
    return [(reducer, dtype, numel, False) for dtype, numel in numel_by_dtype.items()]
