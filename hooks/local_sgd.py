"""Outer steps: ranks train independently and periodically average the changes of their
parameters."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from ..floating_point import default_mode
from .anchors import CALL, difference, everything_in, followed_in, mirror_of, parts_of
from .engines import Future
from .models import named_parameters
from .outer import OuterState, check_schedule, digest, outer_optimizer, warn_of_ddp
from .outer_checkpoint import read, saved_optimizer, to_torch
from .policy import Bits
from .register import Handle
from .stats import Stats
from .summary import log_summary

__all__ = ["OuterAverager"]

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _diloco(anchors: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(anchors, lr=0.7, momentum=0.9, nesterov=True)


@dataclass(slots=True, eq=False)
class _Flight:
    """An exchange whose result has not been applied."""

    fragment: int
    due: int
    """The inner step after which it is applied."""
    starts: list[torch.Tensor]
    """By part: the model's tensors at its start; empty if it is applied at once."""
    changes: list[torch.Tensor]
    """By part: their changes; when the futures are done, the mean over ranks."""
    futures: list[Future]


class OuterAverager:
    """Local SGD and DiLoCo, with compressed exchanges.

    Each rank trains with its own inner optimizer. With a the anchors, the same on all ranks, and
    w_i the parameters of rank i, every `period` inner steps

        a <- outer optimizer(a, gradient: mean over ranks of (a - w_i)),    w_i <- a.

    Only the pseudo-gradients a - w_i are sent and compressed, never parameters.

    With `delay` d an exchange begins after inner step t and is applied after t + d:

        w_i(t + d) <- a + (w_i(t + d) - w_i(t)).

    So each inner step counts in exactly one pseudo-gradient. Fragments, as in Streaming DiLoCo
    (arXiv 2501.18512), are consecutive groups of parameters; fragment p of P is exchanged `period`
    (P - 1 - p) / P steps before the last one.

    Anchors have the parameters' names, and are float32 (float64 for float64 parameters, pairs of
    numbers for complex ones). For bfloat16 and float16 parameters they are master weights:
    pseudo-gradients are relative to the rounded anchors, so a rank without changes sends zeros.
    Only parameters that require a gradient now, and persistent floating-point buffers, are
    averaged; changes of buffers exactly, with the last fragment and without the outer optimizer.

    All ranks must begin with equal parameters and buffers, which they compare. Then anchors keep
    the same bits on all ranks. If their processors round differently, a warning says so.

    Args:
        model: with equal weights on all ranks; may be in DDP over other ranks than those that
            exchange.
        optimizer: a function of the list of anchors that returns the outer optimizer. By default
            that of DiLoCo (arXiv 2311.08105), `torch.optim.SGD(anchors, lr=0.7, momentum=0.9,
            nesterov=True)`; `lambda anchors: torch.optim.SGD(anchors, lr=1.0)` gives the mean of
            the models.
        period: inner steps between two exchanges of a fragment.
        fragments: number of parts in which the model is exchanged, at most `period`.
        delay: inner steps from the start of an exchange to its use, less than `period`.
        bits: per coordinate, see `RHTState`.
        options: of `RHTState`, except `equalize`; by default without warm-up. `process_group` or
            `communicator` give the ranks that exchange, by default the world. With DDP within sites
            use a `HierarchicalCommunicator`: each rank of a site then sends a shard.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range, the model has
            nothing to train, or its parameters have no memory of their own (FSDP).
        RuntimeError: another rank did not connect.
        DisagreementError: on all ranks, if their arguments or models differ.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MakeOptimizer | None = None,
        *,
        period: int,
        fragments: int = 1,
        delay: int = 0,
        bits: Bits = 4,
        **options: Any,
    ) -> None:
        self._model = model
        self._period, self._delay = check_schedule(period, fragments, delay)
        trained, buffers = followed_in(model)
        followed = named_parameters(model) | buffers
        self._fragments = parts_of(trained, buffers, fragments)
        self._parts = [part for parts in self._fragments for part in parts]
        named = {
            name: anchor
            for part in self._parts
            if not part.exact
            for name, anchor in zip(part.names, part.anchors, strict=True)
        }
        self.anchors = mirror_of({name: named[name] for name in trained})
        """A module with the anchors, under the names of the model's parameters."""
        self.optimizer = outer_optimizer(optimizer or _diloco, self.anchors)
        self.inner_steps = 0
        """The number of calls of `step`."""
        self._began = [0] * fragments  # inner step of each one's last exchange
        self._flights: list[_Flight] = []
        self.state = OuterState(self._facts(followed), bits, **options)
        self._handle = Handle(self.anchors, self.state)
        self._engine = self.state.begin(self._parts, followed)
        warn_of_ddp(model, self._engine.topology)
        self._closed = False
        reductions = [
            (self._engine.reducer, p.flat.dtype, p.flat.numel(), False) for p in self._parts
        ]
        what = f"changes of parameters in {period} steps"
        log_summary(self.state, self._device, reductions, what=what, step="period")

    def __repr__(self) -> str:
        return (
            f"OuterAverager({self.state.codec}, period={self._period}, "
            f"fragments={len(self._fragments)}, delay={self._delay}, "
            f"inner_steps={self.inner_steps})"
        )

    @property
    def _device(self) -> torch.device:
        return self._parts[0].flat.device

    # The beginning ------------------------------------------------------------------------------

    def _facts(self, followed: Mapping[str, torch.Tensor]) -> dict[str, object]:
        forms = [(name, tuple(x.shape), x.dtype) for name, x in followed.items()]
        return {
            "period": self._period,
            "fragments": len(self._fragments),
            "delay": self._delay,
            "outer optimizer": self.optimizer,
            "parameters and buffers": forms,
            "what is trained": [part.names for part in self._parts],
        }

    # Steps --------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> bool:
        """Call it after each step of the inner optimizer, on all ranks.

        Also call it if a gradient scaler skipped that step: ranks count the calls.

        Returns:
            Whether an outer step was applied, which changed the parameters.

        Raises:
            RuntimeError: the exchange failed, or the averager was closed.
        """
        self._check_open("step")
        with self._failures_told():
            self.inner_steps += 1
            now, count = self.inner_steps, len(self._fragments)
            begins = [
                i
                for i in range(count)
                if (now - self._period * (i + 1) // count) % self._period == 0
            ]
            if not begins and all(flight.due > now for flight in self._flights):
                return False
            self._look_at_model()
            applied = self._land(now)
            for i in begins:
                self._send(i, now + self._delay)
            return self._land(now) or applied

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange all remaining changes, and set the parameters to the anchors.

        Call it at the end of training, on all ranks. It first applies exchanges in flight, and then
        makes an outer step with each fragment that was not exchanged after the last inner step.

        Raises:
            RuntimeError: the exchange failed, or the averager was closed.
        """
        self._check_open("synchronize")
        with self._failures_told():
            self._look_at_model()
            self._land(self.inner_steps + self._delay)
            for i, began in enumerate(self._began):
                if began < self.inner_steps:
                    self._send(i, self.inner_steps)
            self._land(self.inner_steps)

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise RuntimeError(f"{CALL}.{call}: the averager was closed; create a new one")

    def _look_at_model(self) -> None:
        """Use the model's current tensors: load_state_dict(assign=True) replaces them."""
        present = everything_in(self._model)
        for part in self._parts:
            missing = [name for name in part.names if name not in present]
            if missing:
                raise RuntimeError(
                    f"{CALL}: the model has no {missing[0]} any more; create a new averager"
                )
            part.tensors = [present[name] for name in part.names]
        self.state.learn(self._parts)

    def _send(self, fragment: int, due: int) -> None:
        parts = self._fragments[fragment]
        starts = [part.read() for part in parts]
        changes = [part.change(start) for part, start in zip(parts, starts, strict=True)]
        futures = self.state.send(parts, changes)
        if due == self.inner_steps:
            starts.clear()
        self._began[fragment] = self.inner_steps
        self._flights.append(_Flight(fragment, due, starts, changes, futures))

    def _land(self, now: int) -> bool:
        """Apply exchanges that are due after inner step `now`; return whether there were any."""
        due = [flight for flight in self._flights if flight.due <= now]
        for flight in due:
            self._wait_for(flight)
            with default_mode(pool=True):
                self._apply(flight)
            self._flights.remove(flight)
        return bool(due)

    def _wait_for(self, flight: _Flight) -> None:
        """Until the means are there; raises what went wrong."""
        self.state.wait(flight.futures)
        flight.futures.clear()

    def _apply(self, flight: _Flight) -> None:
        parts = self._fragments[flight.fragment]
        for part, mean in zip(parts, flight.changes, strict=True):
            if part.exact:
                part.flat.sub_(mean)
                continue
            for anchor, gradient in zip(part.anchors, part.views(mean), strict=True):
                anchor.grad = gradient
        self.optimizer.step()  # for anchors with a gradient
        self.optimizer.zero_grad()
        for part, start in zip_longest(parts, flight.starts):
            part.write(part.flat if start is None else part.flat + difference(part.read(), start))

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        """A context whose errors make the other ranks raise too."""
        try:
            yield
        except BaseException as failure:
            self._engine.fail(failure)
            raise

    # Figures, checkpoints, the end --------------------------------------------------------------

    def stats(self) -> Stats:
        """Totals, see `Stats`; `steps` counts the exchanges of a fragment that were started."""
        return self._handle.stats()

    def state_dict(self) -> dict[str, Any]:
        """The state that this rank needs to resume, as copies: plain values and tensors.

        It waits for exchanges in flight, and includes their results. Anchors, buffers' anchors and
        the outer optimizer's state are the same on all ranks. Residuals and exchanges in flight
        belong to this rank, under their own names. The model's parameters are not included, and
        differ between ranks except right after an outer step without `delay` and fragments: save
        them on each rank.
        """
        for flight in self._flights:
            self._wait_for(flight)
        saved = self._handle.state_dict() | {
            "inner_steps": self.inner_steps,
            "anchors": {name: x.clone() for name, x in self.anchors.state_dict().items()},
            "buffers": {name: x.clone() for name, x in self._anchors_of_buffers().items()},
            "optimizer": copy.deepcopy(saved_optimizer(self.optimizer, self.anchors)),
            "exchanged": [*self._began],
            "in_flight": [[flight.fragment, flight.due] for flight in self._flights],
        }
        if self._flights:
            saved[self._name_of_flights()] = {
                str(i): copy.deepcopy({"starts": flight.starts, "changes": flight.changes})
                for i, flight in enumerate(self._flights)
            }
        return saved

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the result of `state_dict`; call it on all ranks, between steps.

        Before the next exchange the ranks compare the anchors. Also load the model's parameters,
        after creating the averager: between outer steps they differ between ranks.

        Args:
            state: what `state_dict` returned on this rank.

        Raises:
            ValueError: it is not a saved state, or belongs to another model, optimizer or rank;
                then nothing has changed.
        """
        lengths = [[part.flat.numel() for part in parts] for parts in self._fragments]
        saved = read(
            state,
            dict(self.anchors.state_dict()),
            self._anchors_of_buffers(),
            saved_optimizer(self.optimizer, self.anchors),
            self._name_of_flights(),
            lengths,
        )
        for flight in self._flights:
            self._wait_for(flight)
        self._handle.load_state_dict(state)
        self.optimizer.load_state_dict(to_torch(saved.optimizer, self.optimizer, self.anchors))
        self.anchors.load_state_dict(dict(saved.anchors))
        for name, anchor in self._anchors_of_buffers().items():
            anchor.copy_(saved.buffers[name])
        self.inner_steps, self._began = saved.inner_steps, saved.began
        self._flights = [
            _Flight(i, due, self._placed(i, starts), self._placed(i, changes), [])
            for i, due, starts, changes in saved.flights
        ]
        self.state.facts |= {
            "inner steps that were loaded": self.inner_steps,
            "anchors that were loaded": [digest(part.flat).hex() for part in self._parts],
            "exchanges in flight that were loaded": state["in_flight"],
        }
        self._engine.agreed = False  # before the next exchange the ranks compare them

    def _placed(self, fragment: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies, on the devices of the fragment's parts."""
        parts = self._fragments[fragment]
        return [x.to(part.flat, copy=True) for part, x in zip(parts, tensors, strict=True)]

    def _anchors_of_buffers(self) -> dict[str, torch.Tensor]:
        return {
            name: anchor.detach()
            for part in self._parts
            if part.exact
            for name, anchor in zip(part.names, part.anchors, strict=True)
        }

    def _name_of_flights(self) -> str:
        rank, world_size = self.state.place() or (0, 1)
        return f"in flight of rank {rank} of {world_size}"

    def close(self) -> None:
        """Stop the worker thread and close private connections; call it on all ranks.

        Exchanges in flight are finished, but not applied: see `synchronize`. Call it before
        `destroy_process_group`.
        """
        if self._closed:
            return
        self._end()
        if self.stats().steps == 0 and self._engine.topology.world_size > 1:
            warnings.warn(
                f"{CALL}: it was closed before the first exchange, after {self.inner_steps} calls "
                f"of step() with period={self._period}: the ranks were never averaged. Call "
                "step() after each step of the inner optimizer, and synchronize() at the end",
                stacklevel=2,
            )

    def _end(self) -> None:
        self._closed = True
        self.state.close()

    def __enter__(self) -> "OuterAverager":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # which explains more than a warning
            self._end()
