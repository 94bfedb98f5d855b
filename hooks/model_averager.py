"""A model averager for torch's `PostLocalSGDOptimizer` that exchanges compressed changes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging import utils
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from .anchors import mirror_of
from .local_sgd import OuterAverager
from .policy import Bits
from .stats import Stats

__all__ = ["CompressedModelAverager"]

CALL = "rhtcomm.hooks.CompressedModelAverager"


class CompressedModelAverager(PeriodicModelAverager):
    """A replacement of torch's `PeriodicModelAverager`, for example in `PostLocalSGDOptimizer`.

    It averages in the same steps. The first average is of the parameters themselves, uncompressed.
    Later ones are of the changes since the previous average a, which is the same on all ranks:

        w_i <- a - mean over ranks of (a - w_i).

    It averages all parameters that require a gradient, whether they have one or not. If the
    parameters change, as after `add_param_group`, the next average is a first one again.

    Checkpoints: `PostLocalSGDOptimizer` saves only the number of steps; then the first average of a
    resumed run is uncompressed. If you also save the averager's `state_dict`, the run resumes with
    the same bits.

    Args:
        period, warmup_steps, process_group: as for `PeriodicModelAverager`.
        bits, options: as for `OuterAverager`.

    Raises:
        TypeError, ValueError, RuntimeError, DisagreementError: as `OuterAverager` does, at the
            first average.
    """

    def __init__(
        self,
        period: int,
        warmup_steps: int = 0,
        process_group: dist.ProcessGroup | None = None,
        *,
        bits: Bits = 4,
        **options: Any,
    ) -> None:
        super().__init__(period, warmup_steps, process_group)
        self._bits, self._options = bits, options
        self._parameters: list[nn.Parameter] = []
        self._outer: OuterAverager | None = None
        self._saved: Mapping[str, Any] | None = None  # a state loaded before the first step

    @torch.no_grad()
    def average_parameters(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, nn.Parameter]]
    ) -> None:
        """Average if it is time; call it on all ranks, after each step.

        Args:
            params: the parameters, or the parameter groups of an optimizer.

        Raises:
            RuntimeError: the exchange failed.
        """
        if self.step >= self.warmup_steps and (self.step - self.warmup_steps) % self.period == 0:
            parameters = _trained(params)
            if self._outer is None or [*map(id, parameters)] != [*map(id, self._parameters)]:
                self._begin(parameters)
            else:
                self._outer.step()
        self.step += 1

    def _begin(self, parameters: list[nn.Parameter]) -> None:
        self.close()
        self._parameters = parameters
        if self._saved is None:
            utils.average_parameters(iter(parameters), self.process_group)
            self._outer = self._make(parameters)
            return
        now = [parameter.clone() for parameter in parameters]
        anchors = self._saved["anchors"]
        for i, parameter in enumerate(parameters):  # ranks begin with the anchors
            parameter.copy_(anchors[str(i)])
        self._outer = self._make(parameters)
        self._outer.load_state_dict(self._saved)
        for parameter, value in zip(parameters, now, strict=True):
            parameter.copy_(value)
        self._saved = None
        self._outer.step()

    def _make(self, parameters: list[nn.Parameter]) -> OuterAverager:
        return OuterAverager(
            mirror_of({str(i): parameter for i, parameter in enumerate(parameters)}),
            lambda anchors: torch.optim.SGD(anchors, lr=1.0),
            period=1,
            bits=self._bits,
            process_group=self.process_group,
            **self._options,
        )

    def stats(self) -> Stats:
        """Totals, see `Stats`, without uncompressed averages; `steps` counts the compressed ones.

        Raises:
            RuntimeError: nothing has been averaged yet.
        """
        if self._outer is None:
            raise RuntimeError(f"{CALL}.stats: nothing has been averaged yet")
        return self._outer.stats()

    def state_dict(self) -> dict[str, Any]:
        """See `OuterAverager.state_dict`; anchors are numbered like the parameters."""
        outer = self._saved if self._outer is None else self._outer.state_dict()
        return {"step": self.step, "outer": outer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the result of `state_dict`; call it on all ranks, between steps.

        Args:
            state: what `state_dict` returned on this rank.

        Raises:
            ValueError: it is not a saved state.
        """
        if not isinstance(state, Mapping) or not {"step", "outer"} <= state.keys():
            raise ValueError(f"{CALL}.load_state_dict: pass what state_dict() returned")
        self.close()
        self.step, self._saved = state["step"], state["outer"]

    def close(self) -> None:
        """Stop the worker thread and close private connections; call it on all ranks.

        Call it before `destroy_process_group`.
        """
        if self._outer is not None:
            self._outer.state.close()
            self._outer = None


def _trained(
    params: Iterable[nn.Parameter] | Iterable[dict[str, nn.Parameter]],
) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for entry in params:
        found += entry["params"] if isinstance(entry, dict) else [entry]
    return [parameter for parameter in found if parameter.requires_grad]
