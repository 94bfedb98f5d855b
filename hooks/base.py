"""Shared by the states of all hooks: configuration, progress, checkpoints and shutdown."""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..arguments import check_bool, natural
from ..communicators import Topology
from ..communicators.stripes import check_connections
from ..randomness import Key
from ..reduce import Algorithm, Reducer, check_algorithm
from . import checkpoint
from .configuration import Quantizer, codec_for, most_bits
from .connect import check_communicator
from .engines import Engine, engine_for
from .layout import Layout
from .models import group_of_model
from .policy import Bits, Exclude, Policy
from .reports import Observer, reports_to
from .residuals import Residuals
from .scales import Scales, read_scales
from .session import Session
from .stats import BucketReport, Stats, Totals

__all__ = ["HookState"]

Self = TypeVar("Self", bound="HookState")


class HookState:
    """Configuration and progress of a hook, whose arguments `RHTState` explains.

    It numbers buckets and steps, makes the engine, and saves and loads checkpoints. Subclasses
    receive the buckets.
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
        connections: int = 1,
        error_feedback: bool = False,
        warmup_steps: int = 64,
        warmup_bits: float | None = None,
        exclude: Exclude = (),
        equalize: bool = False,
        nmse_every: int = 0,
        observer: Observer | Sequence[Observer] | None = None,
    ) -> None:
        self._connections = check_connections(connections, "RHTState")
        check_communicator(communicator, process_group, timeout, connections, "RHTState")
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
        self.reports = reports_to(observer, self.totals, "RHTState")
        self.wishes: dict[tuple[int, int], int] = {}
        self.residuals = Residuals()
        self.scales = Scales() if equalize else None
        self.layout = Layout()
        self._residuals_of: tuple[int, int] | None = None  # the rank and world size that loaded
        self._begin(Session(process_group, timeout, communicator, self._connections))

    def _begin(self, session: Session) -> None:
        """Set the state to that before the first bucket."""
        self._session = session
        # Closes everything if the state is freed without close().
        self._finalizer = weakref.finalize(self, session.close_late)
        self._said: set[torch.dtype] = set()  # in the log

    _LEFT_BEHIND = ("_session", "_finalizer", "_said", "residuals", "scales", "reports")

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: a copy has no worker thread, communicator or observer."""
        self._session.say_that_a_copy_has_none()
        kept = [name for name in vars(self) if name not in self._LEFT_BEHIND]
        state = {name: copy.copy(getattr(self, name)) for name in kept}
        totals = self.totals
        state["totals"] = replace(
            totals, rotations=dict(totals.rotations), waits=dict(totals.waits)
        )
        scales = None if self.scales is None else self.scales.by_parameter()
        return state | {"residuals": self.residuals.by_parameter(), "scales": scales}

    def __setstate__(self, state: dict[str, Any]) -> None:
        residuals, scales = state.pop("residuals"), state.pop("scales")
        vars(self).update(state)
        self.residuals = Residuals()
        self.residuals.replace(residuals)
        self.scales = None if scales is None else Scales(scales)
        self.reports = None
        self._last_index = -1  # wherever in a step it was copied
        self._begin(Session(None, self._timeout, None, self._connections, silent=True))

    def __repr__(self) -> str:
        return (
            f"RHTState({self.codec}, algorithm={self.algorithm!r}, "
            f"error_feedback={self.error_feedback}, seed={self.key.seed}, step={self.key.step})"
        )

    @property
    def engine(self) -> Engine | None:
        """The engine, from the first bucket on."""
        return self._session.engine

    def stats(self) -> Stats:
        """Totals since the state was created: steps that began, and figures of finished buckets."""
        return self.totals.stats(self._steps)

    # Checkpoints --------------------------------------------------------------------------------

    def state_dict(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Plain values with which a resumed run continues with the same random streams and buckets.

        With error feedback also the residuals by parameter name, float32 tensors in the parameters'
        shapes (for complex ones those of `torch.view_as_real`), and the rank and world size:
        residuals differ between ranks, so each must save its own. Residuals of parameters that the
        model no longer has are left out. With equalize also int32 scales.

        Args:
            model: the registered model, or the module inside; needed for values that are saved by
                name.

        Raises:
            ValueError: the model is missing, or the hook has seen only other parameters.
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
        """Resume from the result of `state_dict`; call it on all ranks, between steps.

        If it raises, nothing has changed.

        Args:
            state: from the same rank, if it has residuals.
            model: as for `state_dict`.

        Raises:
            ValueError: the model is missing or another one; the residuals belong to another rank;
                error_feedback differs between this state and the saved one; or it is not a saved
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
        """Rank and world size, if known."""
        return self._session.place(lambda: group_of_model(self)[0])

    # Steps --------------------------------------------------------------------------------------

    def _next(self, index: int, last: bool, engine: Engine) -> tuple[Key, bool]:
        """The key of the bucket with this index, and whether it ends its step."""
        # DDP may leave out a step's last buckets if they have no gradient; randomness must not
        # repeat.
        if index <= self._last_index:
            self.ends.add(self._last_index)
            self._next_step()
        # Payloads carry the number of their user, unless the connections are private.
        owner = 0 if engine.topology.private else self._session.number
        key = Key(self.key.seed, self.key.step, index, owner=owner)
        self._last_index = index
        if last:
            self._next_step()
        return key, last or index in self.ends

    def _next_step(self) -> None:
        self.key, self._last_index = replace(self.key, step=self.key.step + 1), -1
        self._steps += 1

    def _new_reports(self) -> list[BucketReport] | None:
        """The reports for a bucket; None without observers."""
        return None if self.reports is None else []

    # What the state runs on ---------------------------------------------------------------------

    def _make_engine(self, topology: Topology, number: int, device: torch.device) -> Engine:
        reducer = Reducer(self.codec, topology, self.algorithm, self.min_numel)
        reducer.wishes = self.wishes
        residuals = self.residuals if self.error_feedback else None
        kept = (repr(self), self.totals, residuals, self.nmse_every, self.scales)
        engine = self._kind_of_engine(device, reducer)(reducer, self._facts(number), *kept)
        if self.reports is not None:
            engine.turn.before_end = self.reports.land
        return engine

    def _kind_of_engine(self, device: torch.device, reducer: Reducer) -> type[Engine]:
        return engine_for(device, reducer)

    def _facts(self, number: int) -> dict[str, object]:
        """What the ranks compare; `number` is the state's number among the users of a
        communicator."""
        names = ("algorithm", "min_numel", "nmse_every", "error_feedback")
        return {
            **self.codec.configuration,
            **self.policy.facts,
            **{name: getattr(self, name) for name in names},
            "equalize": self.scales is not None,
            "buckets of the checkpoint": self.layout,
            "states that were given its communicator before it": number,
        }

    def close(self) -> None:
        """Finish exchanges in flight, and stop the worker thread, private connections and
        observers.

        Call it before `destroy_process_group`. A state that is freed with its model is closed as
        well.

        Raises:
            PayloadError: on CUDA: an earlier bucket did not hold what it should have.
        """
        self._finalizer.detach()
        self._session.close()
        if self.reports is not None:
            self.reports.close()
        if self.engine is not None and self.engine.failure is None:
            self.engine.checks.raise_failed(wait=True)

    def bypass(self, model: nn.Module) -> None:
        """Restore the averaging that is used without the hook."""
        raise NotImplementedError

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
