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
    """Compress the gradients of a DistributedDataParallel model; call it on all ranks.

    ``handle = rhtcomm.hooks.register(DistributedDataParallel(model), bits=4)``

    It averages over the ranks of the model's own process group, connects them at once, on the
    calling thread, and compares their arguments. Rank 0 logs what it does (INFO). The hook is
    closed when the model is freed; call `close` before `destroy_process_group`.

    Args:
        model: in DistributedDataParallel, or a wrapper of such a model from torch.compile,
            Lightning Fabric or Accelerate.
        bits: bits per coordinate, 1 to 8 ("ecdq": 1 to 6, in quarters), or a function of a
            bucket's parameters.
        options: of `RHTState`.

    Raises:
        TypeError: the model holds no DistributedDataParallel, or is sharded (see `compress_fsdp`).
        ValueError: it holds several DDP models; an option is out of its range, or names other ranks
            than the model's.
        RuntimeError: the model already has a hook, or another rank did not connect.
        DisagreementError: on all ranks, if their arguments differ.
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
    """Connect the ranks of a group, compare their arguments, `add` the hook, and log what it does.

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
            "one; wrap the model in a new DistributedDataParallel"
        ) from error


class Handle:
    """The hook of one model: figures, checkpoints and shutdown.

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
        """Figures of a step for a logger, as means over the steps since the last call.

        ``logger.log({"loss": loss} | handle.figures())``. Names begin with "rhtcomm/": `bytes_sent`
        and `encode_seconds`, `exchange_seconds` and `decode_seconds` of this rank and one step;
        `compression_ratio`; with an observer `exposed_seconds`, the time that training waited; and
        `nmse` of all steps so far, if `nmse_every` is set. Empty if there was no step.
        """
        before, self._shown = self._shown, self.stats()
        return figures(before, self._shown)

    def state_dict(self) -> dict[str, Any]:
        """The state that this rank needs to resume; see `torch.distributed.checkpoint.Stateful`.

        Numbers, parameter names by bucket, and with equalize int32 tensors, the same on all ranks.
        With error feedback also this rank's residuals, under a name with the rank, so that no rank
        loads those of another: float32 tensors in the parameters' shapes, zeros if there is no
        error so far.

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
        """Resume from the result of `state_dict`; call it on all ranks, between steps.

        If it raises, nothing has changed.

        Args:
            state: the result of `state_dict`, on this rank if it has residuals.

        Raises:
            ValueError: it is not a saved state; it has only residuals of other ranks, or of another
                model; or it and this hook differ in error feedback.
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
        """Return to uncompressed averaging, and close the hook; call it on all ranks, between
        steps.

        DDP cannot unregister a hook. So it stays registered, and from now on averages like DDP
        without a hook, with the same bits.
        """
        self.close()
        self._bypass()
        place = self.state.place()
        if place is None or place[0] == 0:
            _log.info("rhtcomm: gradients are averaged as they are from now on")

    def _bypass(self) -> None:
        self.state.bypass(self._model())

    def close(self) -> None:
        """Finish exchanges in flight, and stop the worker thread, private connections and
        observers.

        Call it before `destroy_process_group`. A hook that is freed with its model is closed as
        well.
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
    """A zero residual, in the form of `RHTState.state_dict`."""
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
